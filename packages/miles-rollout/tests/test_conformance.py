"""Our own rollout-side hooks pass the kit that we hand to authors of others."""

import pytest

from miles_api.errors import HookLoadError
from miles_api.hooks import REGISTRY
from miles_api.loading.load import entry_points
from miles_api.testing import ConformanceError, check_hook, make_sample
from miles_api.testing.options import ReliedOn


@pytest.fixture
def options(tokenizer_dir, prompt_file):
    """What these hooks need to be told."""
    return {
        "hf_checkpoint": tokenizer_dir, "prompt_data": prompt_file, "label_key": "label", "rm_type": "math",
        "rollout_max_response_len": 8,
    }  # fmt: skip


def offered(group, name):
    """Return what this package offers under an entry-point group."""
    return [p.load() for p in entry_points(group).get(name, []) if p.dist.name == "miles-rollout"]


def registered():
    """Return every hook of this package: (hook, name of the entry point, default or short name)."""
    defaults = [(name, "default") for name in entry_points("miles.defaults") if offered("miles.defaults", name)]
    short = [
        (spec.name, name)
        for spec in REGISTRY.values()
        for name in entry_points(spec.group)
        if offered(spec.group, name)
    ]
    return defaults + short


# These need a rollout's own hooks and a chat template, held-out prompts, a recording, or weights: their own tests run
# them with those.
_WITH_MORE = {
    ("generate", "multi_turn"), ("generate", "agentic"), ("eval_rollout", "inference"), ("rollout", "recorded"),
    ("reward", "weighted"),
}  # fmt: skip
_LABELS = [make_sample(label=label) for label in ("7", "1/2", "A", ["x", "y"])]


@pytest.mark.parametrize(("hook", "name"), sorted(set(registered()) - _WITH_MORE))
def test_every_default_and_short_name_of_ours_passes_the_kit(options, hook, name):
    found = offered("miles.defaults", hook) if name == "default" else offered(REGISTRY[hook].group, name)
    # Prompts of characters that the test's tokenizer knows.
    samples = [make_sample(prompt="say 3>", label="3", response="3", tokens=[5, 6, 7], response_length=1)]
    report = check_hook(hook, found[0], samples=samples if hook == "rollout" else None, **options)
    assert report.passed


def test_the_table_of_what_we_offer_is_not_empty():
    assert {hook for hook, _ in registered()} >= {
        "rollout", "generate", "data_source", "buffer_filter", "reward", "reward_post_process", "convert_samples",
        "dynamic_filter",
    }  # fmt: skip


@pytest.mark.parametrize("rm_type", ["math", "f1", "boxed_math", "random"])
def test_built_in_rewards_score_labels_of_any_kind(rm_type):
    assert check_hook("reward", offered("miles.defaults", "reward")[0], rm_type=rm_type, samples=_LABELS).passed


def test_hooks_that_read_rewards_take_dicts_of_them():
    for hook in ("reward_post_process", "convert_samples"):
        assert check_hook(hook, offered("miles.defaults", hook)[0], reward_key="accuracy").passed
    for name in ("check_reward_nonzero_std", "check_no_aborted"):
        assert check_hook("dynamic_filter", name, reward_key="accuracy").passed


def test_normalisation_in_each_of_its_forms_gives_finite_rewards():
    found = offered("miles.defaults", "reward_post_process")[0]
    for centred, scaled in ((False, False), (True, False), (True, True)):
        assert check_hook(
            "reward_post_process", found, rewards_normalization=centred, grpo_std_normalization=scaled
        ).passed  # fmt: skip


def test_the_default_rollout_evaluates_too(options):
    data = options["prompt_data"]
    report = check_hook("rollout", "inference", **options, eval_interval=1, eval_prompt_data=data)
    assert "evaluates" in report.passed
    assert check_hook("eval_rollout", "miles_rollout.loop:InferenceRollout", **options, eval_prompt_data=data).passed


def test_a_default_rollout_with_hooks_of_its_own_passes(options, tmp_path):
    (tmp_path / "mine.py").write_text("def keep(args, samples):\n    return len(samples) > 0\n")
    own = {"dynamic_sampling_filter_path": f"{tmp_path}/mine.py:keep", "over_sampling_batch_size": 3}
    assert check_hook("rollout", "inference", **options, **own).passed


def test_a_rollout_without_a_reward_says_what_is_missing(options):
    with pytest.raises(ConformanceError, match="pass --rm-type or --custom-rm-path"):
        check_hook("rollout", "inference", **{**options, "rm_type": None})


def test_what_hooks_may_rely_on_has_the_defaults_of_our_options(hook_args):
    args, relied = hook_args(), ReliedOn()
    own = [
        field
        for point in entry_points("miles.options").values()
        for kind in [point[0].load()]
        for field in kind.__struct_fields__
        if field in ReliedOn.__struct_fields__
    ]
    differing = {name: (getattr(args, name), getattr(relied, name)) for name in own}
    served = {"sglang_router_ip", "sglang_router_port"}
    assert {name: pair for name, pair in differing.items() if pair[0] != pair[1] and name not in served} == {}


def test_a_short_name_that_is_not_offered_is_answered_with_the_nearest():
    with pytest.raises(HookLoadError, match="did you mean 'check_no_aborted'"):
        check_hook("dynamic_filter", "check_no_abort")
