from __future__ import annotations

import io
import re
import threading

import pytest

from miles_train.view.progress import Progress, sparkline

METRICS = {
    "rollout/reward": 0.31,
    "rollout/response_length": 5.1,
    "rollout/tokens": 360.0,
    "train/logprob_gap_max": 2e-6,
}
SECONDS = {"generate": 0.14, "train": 0.12, "convert": 0.01, "total": 0.29}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def run(progress: Progress, clock: Clock, rollouts: int, seconds: float) -> None:
    for rollout_id in range(rollouts):
        progress.phase("generate", rollout_id)
        clock.at += seconds
        progress.rollout(rollout_id, METRICS, SECONDS)


def test_a_plain_line_says_what_matters():
    stream, clock = io.StringIO(), Clock()
    with Progress(120, stream, now=clock) as progress:
        progress.eval({"eval/sort/reward": 0.4, "eval/sort/truncated": 0.0})
        clock.at = 0.3
        progress.rollout(0, METRICS, SECONDS)
    line = stream.getvalue().splitlines()[0]
    assert line == (
        "rollout 1/120  reward 0.31  held-out 0.40  len 5.1  1,241 tok/s  gen 0.14 s  train 0.12 s  gap 2e-6  eta 0:35"
    )


def test_where_nothing_is_scored_the_loss_is_what_is_told():
    stream = io.StringIO()
    with Progress(1, stream, now=Clock()) as progress:
        progress.rollout(0, {"rollout/tokens": 360.0, "train/loss": 1.2345}, SECONDS)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("rollout 1/1  loss 1.23  1,241 tok/s")
    assert last.endswith("  loss 1.23")


def test_quick_rollouts_do_not_each_get_a_line_but_the_first_and_the_last_do():
    stream, clock = io.StringIO(), Clock()
    with Progress(120, stream, now=clock) as progress:
        run(progress, clock, 120, seconds=0.3)
    shown = [int(number) for number in re.findall(r"^rollout (\d+)/120", stream.getvalue(), re.MULTILINE)]
    assert shown[0] == 1
    assert shown[-1] == 120
    assert 5 <= len(shown) <= 10


def test_a_run_of_days_gets_at_most_a_line_a_minute():
    stream, clock = io.StringIO(), Clock()
    with Progress(20_000, stream, now=clock) as progress:
        run(progress, clock, 20_000, seconds=10.0)
    assert 20_000 * 10 / 60 / 2 < len(stream.getvalue().splitlines()) <= 20_000 * 10 / 60 + 30


def test_start_up_phases_are_said_as_they_begin_and_phases_of_a_rollout_are_not():
    stream, clock = io.StringIO(), Clock()
    with Progress(2, stream, now=clock) as progress:
        progress.phase("starting engines")
        clock.at = 64.0
        progress.phase("loading model")
        progress.phase("train", 0)
    assert stream.getvalue().splitlines()[:2] == ["[0:00] starting engines", "[1:04] loading model"]
    assert "train" not in stream.getvalue()


def test_the_last_line_tells_how_the_run_ended():
    stream, clock = io.StringIO(), Clock()
    with Progress(3, stream, now=clock) as progress:
        progress.eval({"eval/sort/reward": 0.1})
        run(progress, clock, 3, seconds=20.0)
        progress.eval({"eval/sort/reward": 0.9})
    assert stream.getvalue().splitlines()[-1] == "finished 3/3 rollouts in 1:00  reward 0.31  held-out 0.10 → 0.90"


def test_an_error_names_the_rollout_and_the_phase_and_passes_through():
    stream, clock = io.StringIO(), Clock()

    def fail() -> None:
        with Progress(3, stream, now=clock) as progress:
            run(progress, clock, 1, seconds=20.0)
            progress.phase("train", 1)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert stream.getvalue().splitlines()[-1] == "stopped at rollout 1/3 in train after 0:20: ValueError"


def test_several_held_out_sets_are_told_apart():
    stream = io.StringIO()
    with Progress(1, stream, now=Clock()) as progress:
        progress.eval({"eval/sort/reward": 0.5, "eval/math/easy/reward": 0.25})
        progress.rollout(0, METRICS, SECONDS)
    assert "held-out sort 0.50, math/easy 0.25" in stream.getvalue()


def test_numbers_that_a_run_does_not_have_are_left_out():
    stream = io.StringIO()
    with Progress(2, stream, now=Clock()) as progress:
        progress.rollout(0, {}, {})
        progress.rollout(1, {"rollout/reward": float("nan")}, {"total": 0.0})
    assert stream.getvalue().splitlines() == [
        "rollout 1/2  eta —",
        "rollout 2/2  reward nan  eta 0:00",
        "finished 2/2 rollouts in 0:00  reward nan",
    ]


def test_a_terminal_shows_reward_trend_split_and_eta_on_few_lines():
    stream, clock = io.StringIO(), Clock()
    with Progress(120, stream, live=True, now=clock) as progress:
        for rollout_id in range(37):
            clock.at += 0.5
            progress.rollout(rollout_id, {**METRICS, "rollout/reward": rollout_id / 40}, SECONDS)
        progress.phase("weight sync", 37)
        clock.at += 2
        progress.note("a note [with brackets]")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "a note [with brackets]" in shown
    last = shown[shown.rindex("rollout 37/120") :].splitlines()
    assert "eta 0:42" in last[0]
    assert "reward 0.9 ▁" in last[1]
    assert "█" in last[1]
    assert "gen 0.14 s  train 0.12 s" in last[2]


def test_a_terminal_display_leaves_no_thread_behind():
    before = set(threading.enumerate())
    with Progress(1, io.StringIO(), live=True):
        (refresher,) = set(threading.enumerate()) - before
    refresher.join(timeout=10)
    assert not refresher.is_alive()


def test_a_sparkline_spans_its_values():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, float("nan"), 0.3]) == "▁▁"
    assert sparkline([]) == ""


def test_why_steps_changed_nothing_is_said_once_for_each_cause():
    stream, clock = io.StringIO(), Clock()
    dead = {"train/zero_gradient_steps": 2.0, "train/zero_gradient/zero_advantages": 2.0}
    with Progress(120, stream, now=clock) as progress:
        for rollout_id, more in enumerate(({}, dead, dead, dead | {"train/zero_gradient/masked": 1.0})):
            progress.rollout(rollout_id, METRICS | more, SECONDS)
    said = [line for line in stream.getvalue().splitlines() if "changed nothing" in line]
    assert [line.partition(" (")[0] for line in said] == [
        "rollout 2: 2 optimizer steps changed nothing: every advantage was 0: in each group all rewards were equal",
        "rollout 4: 1 optimizer step changed nothing: every token was masked",
    ]
