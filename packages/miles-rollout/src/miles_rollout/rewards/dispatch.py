"""From `--rm-type` to a grader: one table, and the two ways into it."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError, did_you_mean
from miles_api.options import options_from
from miles_rollout.options import RewardOptions
from miles_rollout.rewards.boxes import last_boxed
from miles_rollout.rewards.pool import GraderError, GraderPool, default_pool, pool_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["KINDS", "Kind", "check_rm_type", "data_check_of", "grade", "reward", "score_by"]


class Kind(msgspec.Struct, frozen=True):
    """A built-in reward. Functions are references, `module:function`: nothing is imported before it is used."""

    score: str
    """`score(response, label, metadata) -> float`: free of torch, imported without the libraries it needs."""
    in_pool: bool = False
    """Run `score` in the process pool, within the deadline: for graders that an answer can keep busy for ever."""
    needs: tuple[str, ...] = ()
    """Modules that `score` imports and that only `miles-rollout[rewards]` brings."""
    quick: str | None = None
    """`quick(response, label, metadata) -> float | None`: what can be told here and now, before the pool is asked."""
    alone: str = "{}"
    """How the content of a box is put to the grader as a whole response, for `boxed_…`."""
    lowest: float = 0.0
    """What a wrong answer scores."""
    check: str | None = None
    """`check(label, metadata)`: raises `DataError` where no response could be scored; asked for each prompt."""
    reads: tuple[str, ...] | None = None
    """The entries of metadata that a `score` in the pool is given: others, a trace of megabytes say, are not sent."""
    asks: bool = False
    """`score` is `async (args, sample) -> float | dict` instead: it asks somebody else, and only a run can use it."""


_HERE = "miles_rollout.rewards."

KINDS: dict[str, Kind] = {
    "math": Kind(
        _HERE + "math_verified:math_score",
        in_pool=True,
        needs=("math_verify",),
        quick=_HERE + "math:quick_math",
        check=_HERE + "math_text:check_answers",
        reads=(),
        alone="\\boxed{{{}}}",
    ),
    "deepscaler": Kind(
        _HERE + "deepscaler_sympy:deepscaler_score",
        in_pool=True,
        needs=("sympy",),
        quick=_HERE + "deepscaler:quick_deepscaler",
        check=_HERE + "math_text:check_answers",
        reads=(),
        alone="</think>\\boxed{{{}}}",
    ),
    "dapo": Kind(_HERE + "dapo:dapo_score", check=_HERE + "math_text:check_answers", alone="Answer: {}", lowest=-1.0),
    "f1": Kind(_HERE + "f1:f1_score", check=_HERE + "f1:f1_check"),
    "gpqa": Kind(_HERE + "gpqa:gpqa_score", check=_HERE + "gpqa:gpqa_check"),
    "ifbench": Kind(
        _HERE + "ifbench_checkers:ifbench_score",
        in_pool=True,
        needs=("if_verifiable", "langdetect", "nltk"),
        quick=_HERE + "ifbench:quick_ifbench",
        check=_HERE + "ifbench_checkers:ifbench_check",
        reads=("instruction_id_list", "kwargs"),
    ),
    "random": Kind(_HERE + "chance:random_score"),
    "remote_rm": Kind(_HERE + "remote:remote_rm", asks=True),
}
_BOXED = "boxed_"


def check_rm_type(rm_type: str) -> Kind:
    """Return the kind that `rm_type` names.

    Raises `ConfigError` if there is none, or if a library that it needs is not installed.
    """
    kind = KINDS.get(rm_type.removeprefix(_BOXED))
    if kind is None:
        raise ConfigError(
            f"--rm-type {rm_type!r} is none of {', '.join(KINDS)} (or boxed_ in front){did_you_mean(rm_type, KINDS)}"
        )
    if kind.asks and rm_type.startswith(_BOXED):
        raise ConfigError(f"--rm-type {rm_type} asks a server, which gets the whole response: leave {_BOXED} out")
    absent = [name for name in kind.needs if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"--rm-type {rm_type} needs {', '.join(absent)}, which is not installed: "
            "pip install 'miles-rollout[rewards]'"
        )
    return kind


@functools.cache
def data_check_of(rm_type: str) -> Callable[[Any, dict[str, Any]], None] | None:
    """Return what raises `DataError` for a prompt that a kind cannot score, if the kind has it.

    Raises `ConfigError` as `check_rm_type` does.
    """
    reference = check_rm_type(rm_type).check
    return None if reference is None else _function(reference)


@functools.cache
def _found(rm_type: str) -> tuple[Kind, Callable[..., Any] | None]:
    """Return a kind and the function of it that runs in this process."""
    kind = check_rm_type(rm_type)
    reference = kind.quick if kind.in_pool else kind.score
    return kind, None if reference is None else _function(reference)


def _function(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _here(rm_type: str, response: Any, label: Any, metadata: dict[str, Any]) -> tuple[Kind, str, float | None]:
    """Return the kind, what it grades, and the score if it can be told without the pool."""
    kind, function = _found(rm_type)
    if not isinstance(response, str):
        response = "" if response is None else bytes(response).decode(errors="replace")
    if rm_type.startswith(_BOXED):
        answer = last_boxed(response)
        response = "" if answer is None else kind.alone.format(answer)
    return kind, response, None if function is None else function(response, label, metadata)


def _submitted(pool: GraderPool, kind: Kind, response: str, label: Any, metadata: dict[str, Any]) -> Future[float]:
    sent = metadata if kind.reads is None else {name: metadata[name] for name in kind.reads if name in metadata}
    return pool.submit(kind.score, response, label, sent)


def grade(rm_type: str, response: str | bytes | None, label: Any, metadata: dict[str, Any] | None = None) -> float:
    """Score `response` against `label` as `--rm-type` does; `boxed_…` grades the content of the last `\\boxed{}`.

    None is an empty response, and bytes are one in UTF-8. `metadata` is for graders that need more than a label. May be
    called from any thread; not from an event loop, which would stand still meanwhile. Raises `ConfigError` for an
    unknown kind, one whose library is not installed, or one that asks a server; `DataError` for a label or metadata
    that says too little; `GraderError` when no verdict came within the deadline or the grader died.
    """
    if _found(rm_type)[0].asks:
        raise ConfigError(f"--rm-type {rm_type} asks a server: it scores the samples of a run, see rewards.reward")
    kind, response, score = _here(rm_type, response, label, metadata or {})
    if score is None:
        score = _submitted(default_pool(), kind, response, label, metadata or {}).result()
    return score


async def reward(args: Args, sample: Sample) -> float | dict[str, float]:
    """Score a sample by `--rm-type`, or by `rm_type` in its metadata; the default reward hook. Raises as `score_by`."""
    rm_type = sample.metadata.get("rm_type") or args.rm_type
    if rm_type is None:
        raise ConfigError("no reward is set: pass --rm-type or --custom-rm-path")
    return await score_by(rm_type, args, sample)


async def score_by(rm_type: str, args: Args, sample: Sample) -> float | dict[str, float]:
    """Score a sample by one kind of reward, whatever `rm_type` its metadata names.

    Raises `GraderError` when no verdict came within `--rm-timeout` seconds or the grader died, unless
    `--rm-on-timeout zero`.
    """
    kind, _ = _found(rm_type)
    if kind.asks:
        return await _function(kind.score)(args, sample)
    kind, response, score = _here(rm_type, sample.response, sample.label, sample.metadata)
    if score is not None:
        return score
    options: RewardOptions = options_from(args, RewardOptions)
    try:
        return await asyncio.wrap_future(_submitted(pool_of(options), kind, response, sample.label, sample.metadata))
    except GraderError as error:
        # A grader that raises is broken, whatever the answer: that is never a score.
        if options.rm_on_timeout == "error" or error.count not in ("timeouts", "deaths"):
            raise
        return kind.lowest
