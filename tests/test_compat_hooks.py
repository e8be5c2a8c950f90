"""Hooks as they are written for Miles 0.x and slime, one of each kind, load and work unmodified."""

import asyncio
from pathlib import Path

import pytest
import torch

from miles_api import Args, Sample
from miles_api.batch import REQUIRED_COLUMNS
from miles_api.compat.adapters import CompatWarning
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import resolve

FOLDER = Path(__file__).parent / "older_hooks"
ROLLOUT = {
    "rollout": "generate_rollout", "eval_rollout": "generate_rollout", "generate": "generate", "data_source": "Source",
    "reward": "reward", "group_reward": "reward", "reward_post_process": "post_process_rewards",
    "dynamic_filter": "check_group", "buffer_filter": "newest_first", "sample_filter": "leave_out_short",
    "all_samples_process": "look_at_all", "convert_samples": "convert", "rollout_log": "log_rollout",
    "eval_rollout_log": "log_eval", "router_middleware": "Middleware", "agent": "run_agent", "agent_abort": "abort",
    "execute_tool": "execute_tool", "tool_specs": "tool_specs",
}  # fmt: skip
TRAIN = {
    "rollout_data_postprocess": "mask_unlikely", "advantage": "advantage", "loss": "slime_loss",
    "importance_weights": "weights", "pg_loss_reducer": "reducer", "megatron_init": "init",
    "before_log_prob": "before_log_prob", "before_train_step": "before_train_step", "post_save": "post_save",
    "model_provider": "model_provider",
}  # fmt: skip


def load(hook, function=None, view=None):
    file = "rollout_side.py" if hook in ROLLOUT else "train_side.py"
    name = function or {**ROLLOUT, **TRAIN}[hook]
    return resolve(REGISTRY[hook], f"{FOLDER / file}:{name}", view)


@pytest.mark.filterwarnings("ignore::miles_api.compat.adapters.CompatWarning")
@pytest.mark.parametrize("hook", REGISTRY)
def test_a_hook_of_every_kind_loads_and_its_origin_is_its_own_file(hook):
    found = load(hook)
    assert Path(found.origin.file).parent == FOLDER
    assert found.origin.sha256


def test_a_data_hook_that_sees_no_data_is_called_with_a_warning():
    view = Args({})
    with pytest.warns(CompatWarning, match="--rollout-data-postprocess-path .* takes args alone"):
        hook = load("rollout_data_postprocess", view=view)
    hook(view, 0, {})
    assert view.called


def test_a_rollout_function_gets_evaluation_by_keyword_and_its_outputs_are_ours():
    hook = load("rollout")
    source = load("data_source").built(Args({})).target
    train, held_out = hook(Args({}), 0, source, False), hook(Args({}), 0, source, True)
    assert [len(group) for group in train.samples] == [1, 1]
    assert train.metrics == {}
    assert held_out.data["held_out"]["rewards"] == [1.0]


def test_one_reward_function_scores_samples_and_groups():
    samples = [Sample(response="Answer: 1/2", label="0.5"), Sample(response="Answer: no", label="0.5")]
    assert asyncio.run(load("group_reward").acall(None, Args({}), samples)) == [1.0, 0.0]
    assert asyncio.run(load("reward").acall(None, Args({}), samples[0])) == 1.0


def test_filters_rewards_and_logs_get_what_they_expect():
    args = Args({"reward_key": None})
    samples = [Sample(index=i, reward=1.0, response_length=i, tokens=[7] * (i + 1)) for i in range(2)]
    assert load("dynamic_filter")(args, samples).keep is True
    assert load("buffer_filter")(args, None, groups := [[1], [2]], 1) == [[2]]
    assert groups == [[1]]
    load("sample_filter")(args, [samples])
    assert [sample.remove_sample for sample in samples] == [True, True]
    assert load("reward_post_process")(args, samples) == ([1.0, 1.0], [0.5, 0.5])
    view = args.fork()
    assert load("rollout_log", view=view)(0, args, samples, {"a": 1.0}, 0.5) is True
    assert view.logged["rollout/response_len/max"] == 1.0
    columns = load("convert_samples")(args, samples, raw_rewards=[1.0, 1.0], rewards=[0.5, 0.5])
    assert set(columns) == REQUIRED_COLUMNS
    assert columns["total_lengths"] == [1, 2]


LENGTHS = [2, 3]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {
        "tokens": [torch.arange(n + 1) for n in LENGTHS], "response_lengths": LENGTHS,
        "total_lengths": [n + 1 for n in LENGTHS], "loss_masks": [torch.ones(n) for n in LENGTHS],
        "log_probs": [-torch.rand(n) for n in LENGTHS], "advantages": [torch.randn(n) for n in LENGTHS],
    }  # fmt: skip


def helpers(log_probs):
    def log_probs_and_entropy(logits, entropy=False):
        return list(log_probs), [torch.full_like(one, 0.5) for one in log_probs] if entropy else None

    return {"log_probs_and_entropy": log_probs_and_entropy, "parallel": object()}


def test_a_loss_of_slime_computes_ppo_with_the_imported_helpers(batch):
    now = [(lp - 0.5 * torch.rand_like(lp)).requires_grad_() for lp in batch["log_probs"]]
    reduce = load("pg_loss_reducer")(batch["total_lengths"], LENGTHS, batch["loss_masks"])
    loss, metrics = load("loss")(Args({}), batch, torch.zeros(1), reduce, **helpers(now))
    expected = torch.zeros(())
    for new, old, advantage in zip(now, batch["log_probs"], batch["advantages"], strict=True):
        ratio = torch.exp(new - old)
        clipped = torch.max(-ratio * advantage, -torch.clamp(ratio, 0.8, 1.28) * advantage)
        kl = torch.exp(old - new) - (old - new) - 1
        expected = expected + clipped.mean() + 0.01 * kl.mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(lp.grad is not None and lp.grad.abs().sum() > 0 for lp in now)
    assert 0 <= metrics["clipfrac"] <= len(LENGTHS)


def test_a_loss_of_miles_gets_the_parallel_state_second(batch):
    reduce = load("pg_loss_reducer")(batch["total_lengths"], LENGTHS, batch["loss_masks"], True)
    loss, _ = load("loss", "miles_loss")(Args({}), batch, torch.zeros(1), reduce, **helpers(batch["log_probs"]))
    torch.testing.assert_close(loss, -torch.cat(batch["log_probs"]).sum() - 0.1 * 0.5 * sum(LENGTHS))


def test_importance_weights_work_on_whole_responses(batch):
    given = {
        "args": Args({}), "pg_loss": torch.ones(5), "train_log_probs": batch["log_probs"],
        "rollout_log_probs": [lp - 0.1 for lp in batch["log_probs"]], "loss_masks": batch["loss_masks"],
        "total_lengths": batch["total_lengths"], "response_lengths": LENGTHS, "parallel_state": None,
        "max_seq_lens": None,
    }  # fmt: skip
    loss, masks, metrics = load("importance_weights")(**given)
    torch.testing.assert_close(loss, torch.full((5,), 0.1).exp())
    assert masks is batch["loss_masks"]
    assert metrics["ratio"].shape == (5,)


def test_kl_estimates_agree_with_their_definitions():
    from miles_api.compat.tensors import compute_approx_kl, compute_policy_loss

    new, base = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    gap = new - base
    torch.testing.assert_close(compute_approx_kl(new, base, "k1"), gap)
    torch.testing.assert_close(compute_approx_kl(new, base, "k2"), gap**2 / 2)
    torch.testing.assert_close(compute_approx_kl(new, base, "k3", 2.0), 2 * (torch.exp(-gap) - 1 + gap))
    assert compute_approx_kl(base, base - 50, "low_var_kl").max() == 10
    with pytest.raises(ValueError, match="k9"):
        compute_approx_kl(new, base, "k9")
    loss, _ = compute_policy_loss(torch.tensor([-3.0]), torch.tensor([-1.0]), 0.2, 0.2, 3.0)
    assert loss.item() == 3.0


def test_a_model_provider_is_called_with_what_it_takes():
    everything = {"pre_process": True, "post_process": False, "vp_stage": 1}
    assert load("model_provider")(**everything, config=1, hf_config={}, pg_collection=None, args=None) == (
        "model", True, False, 1,
    )  # fmt: skip
