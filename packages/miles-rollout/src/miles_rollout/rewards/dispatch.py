"""From `--rm-type` to a grader."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError, did_you_mean
from miles_rollout.rewards.f1 import f1_score
from miles_rollout.rewards.math import last_boxed, math_score

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["KINDS", "check_rm_type", "grade", "reward"]

KINDS: dict[str, Callable[[str, Any], float]] = {
    "math": math_score,
    "f1": f1_score,
    "random": lambda response, label: float(random.Random(f"{response}/{label}").random() < 0.5),  # noqa: PLR2004
}
_BOXED = "boxed_"


def check_rm_type(rm_type: str) -> None:
    """Raise `ConfigError` unless `rm_type` names a grader."""
    if rm_type.removeprefix(_BOXED) not in KINDS:
        raise ConfigError(
            f"--rm-type {rm_type!r} is none of {', '.join(KINDS)} (or boxed_ in front){did_you_mean(rm_type, KINDS)}"
        )


def grade(rm_type: str, response: str, label: Any, metadata: dict[str, Any] | None = None) -> float:
    """Score `response` against `label`; `boxed_…` grades the content of the last `\\boxed{}`, 0 without one.

    `metadata` is taken for graders that need more than a label. Raises `ConfigError` for an unknown kind.
    """
    check_rm_type(rm_type)
    if rm_type.startswith(_BOXED):
        answer = last_boxed(response)
        return 0.0 if answer is None else KINDS[rm_type.removeprefix(_BOXED)](answer, label)
    return KINDS[rm_type](response, label)


def reward(args: Args, sample: Sample) -> float:
    """Score a sample by `--rm-type`, or by `rm_type` in its metadata."""
    rm_type = sample.metadata.get("rm_type") or args.rm_type
    if rm_type is None:
        raise ConfigError("no reward is set: pass --rm-type or --custom-rm-path")
    return grade(rm_type, sample.response, sample.label, sample.metadata)
