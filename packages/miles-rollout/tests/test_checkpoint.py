"""What the rollout process saves, another one continues from: buffer, budget, chances, counts, random states."""

import random
import subprocess
import sys

import numpy as np
import pytest

from miles_api import generators
from miles_api.errors import DataError
from miles_api.packing.packed import ArrayBlob
from miles_rollout import checkpoint
from miles_rollout.data_source import RolloutDataSourceWithBuffer


def moved(worker, first, tmp_path, **values):
    """Save what `first` has come to, and load it in another process's worker."""
    first.save(0, str(tmp_path))
    second = worker(**values)
    second.load(0, str(tmp_path))
    return second


def test_partial_samples_come_back_with_every_field(args_of, tmp_path):
    args = args_of(save=str(tmp_path), load=str(tmp_path))
    source = RolloutDataSourceWithBuffer(args)
    group, other = source.get_samples(2)
    group[0].tokens, group[0].response_length = [1, 2, 3], 2
    group[0].rollout_log_probs = [-0.1, -1 / 3]
    group[0].rollout_routed_experts = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    group[0].metadata = {"nested": {1: (2, b"3")}, "nan": float("nan")}
    group[0].turn = {"tool": ("called", 2)}
    group[1].status = "aborted"
    fanned_out = [[other[0], other[1]], other[2]]
    source.add_samples([group, fanned_out])
    source.save(0)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(0)
    (first, second, third), back = resumed.get_samples(2)
    assert (first.tokens, first.rollout_log_probs) == ([1, 2, 3], [-0.1, -1 / 3])
    assert isinstance(first.rollout_routed_experts, ArrayBlob)
    np.testing.assert_array_equal(np.asarray(first.rollout_routed_experts), group[0].rollout_routed_experts)
    assert first.metadata["nested"] == {1: (2, b"3")}
    assert np.isnan(first.metadata["nan"])
    assert first.turn == {"tool": ("called", 2)}
    assert (second.status, third) == ("aborted", group[2])
    assert back == fanned_out
    assert isinstance(group[0].rollout_routed_experts, np.ndarray)


def test_what_cannot_be_written_down_stops_the_save_with_its_place(args_of, tmp_path):
    source = RolloutDataSourceWithBuffer(args_of(save=str(tmp_path)))
    (group,) = source.get_samples(1)
    group[1].handle = object()
    source.add_samples([group])
    with pytest.raises(Exception, match=r"sample 1 \(group 0\): handle holds a builtins\.object"):
        source.save(0)


FAILS_ON_GROUPS = (
    "def fn(args, sample):\n    if sample.group_index in {bad}:\n        raise ValueError('mine')\n    return 1.0\n"
)


def test_a_resumed_run_spends_the_error_budget_that_is_left(worker, hook, tmp_path):
    options = {"rm_type": None, "hook_error_budget": "1", "hook_retries": 0, "rollout_batch_size": 2}
    first = worker(custom_rm_path=hook(FAILS_ON_GROUPS.format(bad={0})), **options)
    first.generate(0, "1")
    again = {"custom_rm_path": hook(FAILS_ON_GROUPS.format(bad={3})), **options}
    second = moved(worker, first, tmp_path, **again)
    with pytest.raises(ValueError, match="mine") as caught:
        second.generate(1, "1")
    assert any("2 groups of" in note and "--hook-error-budget 1" in note for note in caught.value.__notes__)


def test_a_group_that_had_its_chance_before_the_checkpoint_gets_no_other(worker, hook, tmp_path):
    calls = tmp_path / "calls"
    fails = hook(
        "def fn(args, sample):\n"
        "    if sample.group_index == 0:\n"
        f"        open({str(calls)!r}, 'a').write('x')\n"
        "        raise ValueError('mine')\n"
        "    return 1.0\n"
    )
    options = {
        "rm_type": None, "custom_rm_path": fails, "hook_retries": 0, "n_samples_per_prompt": 1,
        "rollout_batch_size": 1, "hook_error_budget": "9",
    }  # fmt: skip
    first = worker(**options)
    first._data_source.add_samples(first._data_source.get_samples(1))
    first._rollout.target._returned = {0: True}
    second = moved(worker, first, tmp_path, **options)
    assert second.generate(1, "1")["metrics"]["rollout/dropped/hook_error:reward"] == 1
    assert calls.read_text() == "x"


def test_hook_metrics_go_on_as_if_the_process_had_never_ended(worker, hook, prompt_file, tmp_path):
    options = {
        "rm_type": None, "custom_rm_path": hook("def fn(args, sample):\n    return 1.0\n"), "hook_retries": 0,
        "eval_prompt_data": prompt_file,
    }  # fmt: skip
    first = worker(**options)
    first.generate(0, "1")
    first.evaluate(0, "1")
    second = moved(worker, first, tmp_path, **options)
    left_alone, resumed = (running.generate(1, "1")["metrics"] for running in (first, second))
    for metrics in (left_alone, resumed):
        metrics.pop("hooks/reward/seconds")
    assert resumed == left_alone
    assert resumed["hooks/reward/calls"] == 6 + 5


@pytest.mark.parametrize("load_rng", [True, False])
def test_hooks_draw_on_where_they_were_unless_told_otherwise(worker, tmp_path, load_rng):
    first = worker()
    first.save(0, str(tmp_path))
    expected = random.random(), np.random.random()
    second = worker(load_rng=load_rng)
    second.load(0, str(tmp_path))
    assert ((random.random(), np.random.random()) == expected) == load_rng


LAZY = """
import sys
from miles_api import generators
from miles_rollout import checkpoint
sys.modules.pop("numpy", None)
generators.seed(7)
if sys.argv[1:]:
    generators.restore(checkpoint.read(sys.argv[1]).random)
import numpy
print(numpy.random.random())
"""


def test_a_hook_that_imports_numpy_when_it_is_called_draws_what_the_run_is_seeded_for(tmp_path):
    def drawn(*arguments):
        words = [sys.executable, "-c", LAZY, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert drawn() == drawn()
    state = checkpoint.RolloutState(loop=None, hooks={}, random=generators.states())
    checkpoint.write(str(tmp_path), state)
    assert drawn(tmp_path) == f"{np.random.random()}\n"


def test_a_data_source_that_is_reset_begins_with_the_first_prompt(worker, tmp_path):
    first = worker()
    first.generate(0, "1")
    second = moved(worker, first, tmp_path, reset_data_source=True)
    assert second.generate(1, "1")["samples"][0]["index"] == 0
    third = moved(worker, first, tmp_path)
    assert third.generate(1, "1")["samples"][0]["index"] == 6


def test_prompts_that_begin_anew_do_not_take_the_random_states_with_them(worker, tmp_path):
    first = worker()
    first.save(0, str(tmp_path))
    expected = random.random(), np.random.random()
    second = worker(reset_data_source=True)
    second.load(0, str(tmp_path))
    assert (random.random(), np.random.random()) == expected


def test_the_loops_state_does_not_depend_on_the_data_source_being_ours(worker, hook, tmp_path):
    source = hook(
        "from pathlib import Path\n"
        "from miles_rollout.data_source import RolloutDataSourceWithBuffer\n"
        "class fn(RolloutDataSourceWithBuffer):\n"
        "    def save(self, rollout_id):\n"
        "        Path(self._args.save, 'mine').write_text(str(rollout_id))\n"
        "    def load(self, rollout_id=None):\n"
        "        assert Path(self._args.load, 'mine').read_text() == str(rollout_id)\n"
    )
    first = worker(data_source_path=source)
    first._rollout.target._state.guard.budget.started = 77
    second = moved(worker, first, tmp_path, data_source_path=source)
    assert second._rollout.target._state.guard.budget.started == 77


ROLLOUT = """
from miles_rollout.loop import InferenceRollout
class fn(InferenceRollout):
    def state_dict(self):
        return {{"mine": {value}}}
    def load_state_dict(self, state):
        self.mine = state["mine"]
"""


def test_a_rollout_class_keeps_a_state_of_its_own(worker, hook, tmp_path):
    options = {"rollout_function_path": hook(ROLLOUT.format(value="[1, 2.5, 'x']"))}
    second = moved(worker, worker(**options), tmp_path, **options)
    assert second._rollout.target.mine == [1, 2.5, "x"]
    odd = worker(rollout_function_path=hook(ROLLOUT.format(value="object()")))
    with pytest.raises(DataError, match=r"state_dict\(\) holds more than plain values"):
        odd.save(0, str(tmp_path))


def test_a_state_that_is_missing_or_a_directory_that_cannot_be_written_is_named(worker, tmp_path):
    running = worker()
    with pytest.raises(DataError, match=r"nowhere/data_source\.json cannot be written"):
        running.save(0, str(tmp_path / "nowhere"))
    running.save(0, str(tmp_path))
    (tmp_path / "rollout.msgpack").unlink()
    with pytest.raises(DataError, match=r"rollout\.msgpack cannot be read"):
        running.load(0, str(tmp_path))
