"""Do log hooks take every kind of rollout and say whether they replace the built-in log?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.rollout_types import flatten
from miles_api.sample import Status
from miles_api.testing.case import case
from miles_api.testing.untouched import READ_ONLY, Untouched

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []


@case("rollout_log", acts=True, left_out="what is written, and where")
def _rollout_log(trial: Trial) -> None:
    with trial.check("logs a rollout"):
        samples = flatten(trial.maker.rollout())
        given, before = list(samples), Untouched(samples, (*READ_ONLY, "reward"))
        _require_answer(trial, trial.call(0, trial.args, given, {"rollout/dropped/zero_std": 1.0}, 1.5))
        trial.require([*map(id, given)] == [*map(id, samples)], "reordered, added or removed samples in its list")
        before.require(trial)
    with trial.check("logs a rollout without extra metrics"):
        _require_answer(trial, trial.call(1, trial.args, trial.maker.scored(1.0), {}, 0.5))


@case("eval_rollout_log", acts=True, left_out="what is written, and where")
def _eval_rollout_log(trial: Trial) -> None:
    samples = trial.maker.scored(1.0, 0.0)
    data: dict[str, dict[str, Any]] = {
        "math": {
            "rewards": [1.0, 0.0], "truncated": [sample.status == Status.TRUNCATED for sample in samples],
            "samples": samples,
        }
    }  # fmt: skip
    with trial.check("logs an evaluation"):
        before = Untouched(samples, (*READ_ONLY, "reward"))
        _require_answer(trial, trial.call(0, trial.args, data, {"eval/seconds": 1.0}))
        trial.require(sorted(data) == ["math"] and data["math"]["samples"] == samples, "changed the evaluation's data")
        before.require(trial)


def _require_answer(trial: Trial, answer: Any) -> None:
    trial.require(
        answer is None or isinstance(answer, bool),
        f"returned {answer!r:.60}, not True (suppress the built-in log) or False (keep it)",
    )
