"""Public hook files of Miles and slime, unchanged: `MILES_COMPAT_SOURCES=/path/to/miles:/path/to/slime pytest …`.

Each folder is a checkout of radixark/miles or THUDM/slime. Files of neither are in this repository.
"""

import asyncio
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from miles_api import Args, Sample
from miles_api.errors import HookLoadError
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import resolve

FOLDERS = [Path(folder) for folder in os.environ.get("MILES_COMPAT_SOURCES", "").split(os.pathsep) if folder]
pytestmark = pytest.mark.skipif(
    not FOLDERS, reason="MILES_COMPAT_SOURCES names no checkout of radixark/miles or THUDM/slime"
)

RM, LOSS, TIS, GENERATE = "reward", "loss", "importance_weights", "generate"
FILES = [
    ("examples/DrGRPO/custom_reducer.py", "get_pg_loss_reducer", "pg_loss_reducer"),
    ("examples/async_icepop/reinforce_icepop_loss.py", "reinforce_icepop_loss", LOSS),
    ("examples/cispo/cispo_loss.py", "cispo_loss_function", LOSS),
    ("examples/curriculum_learning/data_source.py", "MultipleWeightedRolloutDataSourceWithBuffer", "data_source"),
    ("examples/curriculum_learning/reward_cap_filter.py", "check_reward_cap_per_source", "dynamic_filter"),
    ("examples/experimental/chess/chess_filter.py", "check_chess_group", "dynamic_filter"),
    ("examples/experimental/nemo-gym/sokoban_reward.py", "reward_func", RM),
    ("examples/experimental/nemo-gym/sokoban_reward.py", "reward_func", "group_reward"),
    ("examples/fully_async/fully_async_rollout.py", "generate_rollout_fully_async", "rollout"),
    ("examples/multi_agent/rollout_with_multi_agents.py", "generate_with_multi_agents", GENERATE),
    ("examples/on_policy_distillation/on_policy_distillation.py", "post_process_rewards", "reward_post_process"),
    ("examples/on_policy_distillation/on_policy_distillation.py", "reward_func", RM),
    ("examples/retool/generate_with_retool.py", "generate", GENERATE),
    ("examples/retool/generate_with_retool.py", "reward_func", RM),
    ("examples/search-r1/generate_with_search.py", "generate", GENERATE),
    ("examples/search-r1/generate_with_search.py", "reward_func", RM),
    ("examples/tau-bench/generate_with_tau.py", "generate", GENERATE),
    ("examples/train_infer_mismatch_helper/mis.py", "compute_mis_weights_with_cp", TIS),
    ("miles/rollout/filter_hub/dynamic_sampling_filters.py", "check_no_aborted", "dynamic_filter"),
    ("miles/rollout/filter_hub/dynamic_sampling_filters.py", "check_reward_nonzero_std", "dynamic_filter"),
    ("miles/rollout/generate_hub/benchmarkers.py", "generate_with_random_osl", GENERATE),
    ("miles/rollout/generate_hub/single_turn.py", "generate", GENERATE),
    ("miles/rollout/inference_rollout/compatibility.py", "LegacyGenerateFnAdapter", GENERATE),
    ("miles/rollout/rm_hub/f1.py", "f1_score", RM),
    ("miles/rollout/sleep_rollout.py", "sleep", "rollout"),
]
OUTSIDE = [
    ("examples/curriculum_learning/custom_log.py", "custom_rollout_log_function", "rollout_log", "slime.utils.logging"),
    ("examples/infra_features/train_infer_mismatch_helper/mis.py", "compute_mis_weights_with_cp", TIS, "utils.args"),
    ("miles/rollout/data_source.py", "RolloutDataSource", "data_source", "miles.utils.data"),
    ("miles/rollout/generate_hub/multi_turn.py", "generate", GENERATE, "tool_call_utils"),
    ("miles/rollout/sft_rollout.py", "generate_rollout", "rollout", "miles.utils.mask_utils"),
    (
        "miles/router/middleware_hub/radix_tree_middleware.py",
        "RadixTreeMiddleware",
        "router_middleware",
        "miles.router",
    ),
]
"""Hooks that import what the table does not hold, and what that is."""


def in_checkout(path):
    found = [folder / path for folder in FOLDERS if (folder / path).is_file()]
    if not found:
        pytest.skip(f"no given checkout has {path}")
    return found


def load(file, name, hook, view=None):
    try:
        return resolve(REGISTRY[hook], f"{file}:{name}", view)
    except HookLoadError as error:
        if error.missing:
            pytest.skip(f"{file.name} needs {error.missing}, which is not installed")
        raise


@pytest.mark.parametrize(("path", "name", "hook"), FILES)
def test_a_public_hook_loads_and_fits_unchanged(path, name, hook):
    for file in in_checkout(path):
        assert load(file, name, hook).origin.file == str(file.resolve())


@pytest.mark.parametrize(("path", "name", "hook", "lacking"), OUTSIDE)
def test_a_public_hook_that_needs_more_is_refused_by_the_name_it_needs(path, name, hook, lacking):
    for file in in_checkout(path):
        with pytest.raises(HookLoadError) as error:
            load(file, name, hook)
        assert lacking in str(error.value)
        assert "the nearest it has is" in str(error.value)


LENGTHS = [2, 3]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    log_probs = [-torch.rand(n) for n in LENGTHS]
    return {
        "tokens": [torch.arange(n + 1) for n in LENGTHS], "response_lengths": LENGTHS,
        "total_lengths": [n + 1 for n in LENGTHS], "loss_masks": [torch.ones(n) for n in LENGTHS],
        "log_probs": log_probs, "rollout_log_probs": [lp - 0.05 for lp in log_probs],
        "advantages": [torch.randn(n) for n in LENGTHS],
    }  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """A trainer of one rank, for hooks that ask Megatron."""
    from megatron.core import mpu

    monkeypatch.setattr(mpu, "is_pipeline_last_stage", lambda *a, **k: True)
    monkeypatch.setattr(mpu, "get_context_parallel_world_size", lambda: 1)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("examples/cispo/cispo_loss.py", "cispo_loss_function"),
        ("examples/async_icepop/reinforce_icepop_loss.py", "reinforce_icepop_loss"),
    ],
)
def test_public_losses_give_a_gradient(path, name, batch, alone):
    args = Args(
        {
            "use_rollout_logprobs": False,
            "eps_clip": 0.2,
            "eps_clip_high": 5.0,
            "entropy_coef": 0.01,
            "use_kl_loss": False,
        }
    )
    now = [lp.clone().requires_grad_() for lp in batch["log_probs"]]

    def log_probs_and_entropy(logits, entropy=False):
        return now, [torch.ones_like(one) for one in now] if entropy else None

    def mean(values):
        return sum(part.mean() for part in values.split(LENGTHS))

    (file,) = in_checkout(path)
    loss, metrics = load(file, name, LOSS)(
        args, batch, torch.zeros(1, 7, 3), mean, log_probs_and_entropy=log_probs_and_entropy, parallel=None
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(one.grad.abs().sum() > 0 for one in now)
    torch.testing.assert_close(metrics["entropy_loss"], torch.tensor(2.0))


def test_the_public_importance_weights_run_on_whole_responses(batch):
    (file,) = in_checkout("examples/train_infer_mismatch_helper/mis.py")
    args = Args(
        {"mis_level": "token", "mis_mode": "truncate", "mis_lower_bound": 0.5, "mis_upper_bound": 2.0,
         "mis_veto_threshold": None}
    )  # fmt: skip
    loss, masks, metrics = load(file, "compute_mis_weights_with_cp", TIS)(
        args=args, pg_loss=torch.ones(5), train_log_probs=batch["log_probs"],
        rollout_log_probs=batch["rollout_log_probs"], loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"], response_lengths=LENGTHS, parallel_state=None, max_seq_lens=None,
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.full((5,), 0.05).exp())
    assert [mask.shape for mask in masks] == [(2,), (3,)]
    assert all(value.shape == (5,) for value in metrics.values())


def test_the_public_reducer_divides_by_its_constant(alone):
    for file in in_checkout("examples/DrGRPO/custom_reducer.py"):
        reduce = load(file, "get_pg_loss_reducer", "pg_loss_reducer")([3, 4], LENGTHS, [torch.ones(2), torch.ones(3)])
        assert reduce(torch.ones(5)).item() == pytest.approx(5 / 1000)


def test_public_filters_give_verdicts():
    args = Args({"reward_key": None, "prompt_data_source_names": ["a"], "data_source_reward_caps": [0.3]})
    group = [Sample(reward=float(i), metadata={"data_source": "a"}) for i in range(2)]
    equal = [Sample(reward=1.0, metadata={"data_source": "a"}) for _ in range(2)]
    verdicts = {}
    for path, name, hook in [case for case in FILES if case[2] == "dynamic_filter"]:
        files = [folder / path for folder in FOLDERS if (folder / path).is_file()]
        verdicts |= {name: [load(file, name, hook)(args, samples) for file in files for samples in (group, equal)]}
    if not any(verdicts.values()):
        pytest.skip("no given checkout has a filter")
    expected = {
        "check_chess_group": [True, True], "check_no_aborted": [True, True], "check_reward_cap_per_source": [False] * 2,
        "check_reward_nonzero_std": [True, False],
    }  # fmt: skip
    for name, given in verdicts.items():
        assert [verdict.keep for verdict in given] in ([], expected[name])


class Engine(BaseHTTPRequestHandler):
    """Answers every request with two tokens."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        meta = {
            "finish_reason": {"type": "stop"}, "weight_version": "1", "prompt_tokens": 3, "cached_tokens": 0,
            "output_token_logprobs": [[-0.5, 5, None], [-0.5, 1, None]],
        }  # fmt: skip
        body = json.dumps({"text": "3", "output_ids": [5, 1], "meta_info": meta}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): ...


@pytest.fixture
def worker(quickstart_data, tmp_path):
    """A rollout process with the quickstart's tokenizer and prompts, and an engine that says the same every time."""
    from miles_api.config import RunConfig, option_groups
    from miles_rollout.service import RolloutWorker

    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = {
        "hf_checkpoint": str(quickstart_data / "model"), "prompt_data": str(quickstart_data / "train.jsonl"),
        "label_key": "label", "rm_type": "random", "rollout_batch_size": 2, "n_samples_per_prompt": 2,
    }  # fmt: skip
    started = []

    def start(**values):
        config = RunConfig({name: kind() for name, kind in option_groups().items()}, {})
        started.append(RolloutWorker(config.replace("test", **given, **values)))
        started[-1].start(f"http://127.0.0.1:{server.server_port}")
        return started[-1]

    yield start
    for one in started:
        one.stop()
    server.shutdown()
    server.server_close()


def test_the_public_fully_async_rollout_fills_rollouts(worker):
    (file,) = in_checkout("examples/fully_async/fully_async_rollout.py")
    running = worker(rollout_function_path=f"{file}:generate_rollout_fully_async")
    try:
        for rollout_id in range(2):
            assert len(running.generate(rollout_id, "1")["batch"]["tokens"]) == 4
    finally:
        module = load(file, "generate_rollout_fully_async", "rollout").target.__module__
        sys.modules[module].stop_global_worker()


@pytest.mark.parametrize("path", ["miles/rollout/generate_hub/single_turn.py"])
def test_the_public_generation_generates(worker, path):
    (file,) = in_checkout(path)
    batch = worker(custom_generate_function_path=f"{file}:generate").generate(0, "1")["batch"]
    assert all(tokens[-2:] == [5, 1] for tokens in batch["tokens"])


def test_the_public_data_source_mixes_two_files(worker, quickstart_data):
    from miles_rollout.compat.data import RolloutDataSourceWithBuffer  # noqa: F401  built by the hook

    (file,) = in_checkout("examples/curriculum_learning/data_source.py")
    args = worker()._args.fork()
    args.prompt_data = [str(quickstart_data / "train.jsonl"), str(quickstart_data / "heldout.jsonl")]
    args.data_source_weights, args.prompt_data_source_names = [0.5, 0.5], ["a", "b"]
    source = load(file, "MultipleWeightedRolloutDataSourceWithBuffer", "data_source").built(args).target
    groups = source.get_samples(4)
    assert [group[0].metadata["data_source"] for group in groups] == ["a", "a", "b", "b"]
    source.add_samples(groups[:1])
    assert source.get_buffer_length() == 1


def test_the_public_reward_post_process_reads_its_dicts():
    (file,) = in_checkout("examples/on_policy_distillation/on_policy_distillation.py")
    reward = {"meta_info": {"input_token_logprobs": [[None, 1], [-0.5, 2]]}}

    class Scored:
        def get_reward_value(self, args):
            return reward

    raw, rewards = load(file, "post_process_rewards", "reward_post_process")(Args({}), [Scored()])
    assert raw[0].tolist() == rewards[0].tolist() == [-0.5]


def test_the_public_reward_refuses_a_missing_server(monkeypatch):
    (file,) = in_checkout("examples/experimental/nemo-gym/sokoban_reward.py")
    monkeypatch.setenv("NEMO_GYM_SOKOBAN_URL", "http://127.0.0.1:9")
    hook = load(file, "reward_func", RM)
    sample = Sample(metadata={"sokoban_question": "?"}, label="u", response="u")
    with pytest.raises(Exception, match="connection"):
        asyncio.run(hook.acall(None, Args({}), sample))
