import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_api.checks.check import derive
from miles_api.checks.derive import derive_batch
from miles_api.checks.run_checks import services_of
from miles_api.config import RunConfig
from miles_api.errors import ConfigError
from miles_api.run_options import RunOptions

KNOBS = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")


def derived(**knobs):
    run = derive_batch(RunConfig.of(RunOptions(**knobs))).group(RunOptions)
    return tuple(getattr(run, knob) for knob in KNOBS)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8), st.sampled_from(KNOBS))
def test_any_three_batch_knobs_give_the_fourth(prompts, group, steps, missing):
    whole = dict(zip(KNOBS, (prompts, group * steps, prompts * group, steps), strict=True))
    given_knobs = {knob: value for knob, value in whole.items() if knob != missing}
    assert derived(**given_knobs) == tuple(whole.values())


def test_one_step_and_one_sample_are_what_goes_without_saying():
    assert derived(rollout_batch_size=8, n_samples_per_prompt=4) == (8, 4, 32, 1)
    assert derived(rollout_batch_size=8) == (8, 1, 8, 1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "set --rollout-batch-size or --global-batch-size"),
        ({"rollout_batch_size": 3, "n_samples_per_prompt": 3, "num_steps_per_rollout": 2}, "is not a multiple of"),
        ({"rollout_batch_size": 2, "n_samples_per_prompt": 2, "global_batch_size": 3, "num_steps_per_rollout": 1},
         "batch sizes disagree"),
    ],
)  # fmt: skip
def test_batch_knobs_that_cannot_hold_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        derived(**knobs)


def test_a_derived_value_says_so():
    config = derive_batch(RunConfig.of(RunOptions(rollout_batch_size=8, n_samples_per_prompt=4)))
    assert config.sources["global_batch_size"] == "derived"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"loss_type": "sft_loss"}, "sft"),
        ({"load_debug_rollout_data": "/dump"}, "recorded"),
        ({"load_debug_rollout_data": "/dump", "loss_type": "sft_loss"}, "recorded"),
    ],
)
def test_a_run_that_samples_nothing_gets_the_rollout_function_that_reads(options, expected):
    config = derive(RunConfig.of(RunOptions(rollout_batch_size=8, **options)))
    assert config.args.rollout_function_path == expected


@pytest.mark.parametrize(
    ("options", "services"),
    [
        ({}, ("rollout", "engines", "router", "train")),
        ({"loss_type": "sft_loss"}, ("rollout", "train")),
        ({"load_debug_rollout_data": "/dump"}, ("rollout", "train")),
        ({"debug_rollout_only": True}, ("rollout", "engines", "router")),
    ],
)
def test_a_run_starts_what_it_needs_and_nothing_else(options, services):
    assert services_of(RunOptions(**options)) == services
