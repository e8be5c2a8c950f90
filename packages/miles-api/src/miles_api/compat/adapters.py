"""Calls that the older stacks made differently: a hook of such a signature is wrapped, all others pass untouched.

A wrapper is made only where the signature is plainly an older one that ours would refuse or misread; docs/compat.md
lists them. What fits neither is refused by the ordinary check, with its own signature.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any

from miles_api.compat.tensors import in_loss
from miles_api.loading.fit import is_async

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.spec import HookSpec

__all__ = ["CompatWarning", "adapt"]

_P = inspect.Parameter
_BY_NAME = (_P.POSITIONAL_OR_KEYWORD, _P.KEYWORD_ONLY)


class CompatWarning(UserWarning):
    """A hook is called in an older form that gives it less than ours."""


def adapt(spec: HookSpec, reference: str, found: Any) -> Any:
    """Return `found`, or a wrapper with our signature where it has the one of an older stack."""
    adapter = _ADAPTERS.get(spec.name)
    if adapter is None or not callable(found) or isinstance(found, type):
        return found
    try:
        parameters = inspect.signature(found, follow_wrapped=False).parameters
    except (ValueError, TypeError):
        return found
    return adapter(reference, found, dict(parameters))


def _fits(found: Any, *args: Any, **keywords: Any) -> bool:
    try:
        inspect.signature(found, follow_wrapped=False).bind(*args, **keywords)
    except TypeError:
        return False
    return True


def _plain(parameters: dict[str, _P]) -> list[str]:
    """Return the names of the parameters that a positional argument can fill."""
    return [p.name for p in parameters.values() if p.kind in (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD)]


def _catches_all(parameters: dict[str, _P]) -> bool:
    return any(p.kind in (_P.VAR_POSITIONAL, _P.VAR_KEYWORD) for p in parameters.values())


def _like(found: Callable[..., Any], sync: Callable[..., Any], coroutine: Callable[..., Any] | None = None) -> Any:
    """Dress a wrapper as `found`; the second is taken for an `async def`."""
    wrapper = coroutine if coroutine is not None and is_async(found) else sync
    functools.update_wrapper(wrapper, found)
    return wrapper


def _rollout(reference: str, found: Any, parameters: dict[str, _P]) -> Any:  # noqa: ARG001
    """`evaluation` is passed by keyword there, so it may stand anywhere."""
    evaluation = parameters.get("evaluation")
    if evaluation is None or evaluation.kind not in _BY_NAME or _plain(parameters)[3:4] == ["evaluation"]:
        return found
    if not _fits(found, None, None, None, evaluation=None):
        return found

    def sync(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False, /) -> Any:
        return found(args, rollout_id, data_source, evaluation=evaluation)

    async def coroutine(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False, /) -> Any:
        return await found(args, rollout_id, data_source, evaluation=evaluation)

    return _like(found, sync, coroutine)


def _generate(reference: str, found: Any, parameters: dict[str, _P]) -> Any:  # noqa: ARG001
    """A first parameter called `input` marks the one-argument form there, whatever optional ones follow."""
    plain = _plain(parameters)
    if plain[:1] != ["input"] or not _fits(found, None) or not _fits(found, None, None, None):
        return found

    def sync(input: Any, /) -> Any:  # noqa: A002
        return found(input)

    async def coroutine(input: Any, /) -> Any:  # noqa: A002
        return await found(input)

    return _like(found, sync, coroutine)


def _convert_samples(reference: str, found: Any, parameters: dict[str, _P]) -> Any:  # noqa: ARG001
    """Rewards are given by position in slime, not at all in Miles; three columns are derived there afterwards."""
    if _catches_all(parameters) or {"raw_rewards", "rewards"} & {
        p.name for p in parameters.values() if p.kind is _P.KEYWORD_ONLY
    }:
        return found
    gives_rewards = _fits(found, None, None, None, None)
    if not gives_rewards and not _fits(found, None, None):
        return found

    def convert(args: Any, samples: list[Any], /, *, raw_rewards: list[float], rewards: list[float]) -> Any:
        columns = found(args, samples, raw_rewards, rewards) if gives_rewards else found(args, samples)
        return _with_derived_columns(columns, samples)

    return _like(found, convert)


def _with_derived_columns(columns: Any, samples: list[Any]) -> Any:
    """Add the columns that follow from the samples; a result of another length is left for the check to refuse."""
    if not isinstance(columns, dict) or len(columns.get("tokens", ())) != len(samples):
        return columns
    derived = {
        "total_lengths": [len(tokens) for tokens in columns["tokens"]],
        "group_indices": [sample.group_index for sample in samples],
        "rollout_ids": [s.rollout_id if s.rollout_id is not None else s.index for s in samples],
    }
    return {**derived, **columns}


def _rollout_data_postprocess(reference: str, found: Any, parameters: dict[str, _P]) -> Any:
    """Miles calls it with `args` alone."""
    if _catches_all(parameters) or not _fits(found, None) or _fits(found, None, None, None):
        return found
    warnings.warn(
        f"--rollout-data-postprocess-path {reference} takes args alone, as in Miles 0.x: it cannot see or change the "
        "data; write (args, rollout_id, rollout_data)",
        CompatWarning,
        stacklevel=2,
    )

    def postprocess(args: Any, rollout_id: int, rollout_data: dict[str, Any], /) -> Any:  # noqa: ARG001
        return found(args)

    return _like(found, postprocess)


def _loss(reference: str, found: Any, parameters: dict[str, _P]) -> Any:  # noqa: ARG001
    """Four arguments, in older Miles with `parallel_state` second; the helpers are imported instead of given."""
    if _catches_all(parameters) or {"log_probs_and_entropy", "parallel"} & set(parameters):
        return found
    plain = _plain(parameters)
    takes_state = plain[1:2] == ["parallel_state"] and _fits(found, *[None] * 5)
    if not takes_state and not _fits(found, *[None] * 4):
        return found

    def loss(
        args: Any, batch: dict[str, Any], logits: Any, sum_of_sample_mean: Any, /, *, log_probs_and_entropy: Any,
        parallel: Any,
    ) -> Any:  # fmt: skip
        batch.setdefault("unconcat_tokens", batch.get("tokens"))
        given = (args, parallel, batch) if takes_state else (args, batch)
        with in_loss(log_probs_and_entropy, parallel):
            return found(*given, logits, sum_of_sample_mean)

    return _like(found, loss)


_TIS = (
    "args", "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks", "total_lengths", "response_lengths",
    "parallel_state", "max_seq_lens",
)  # fmt: skip
_RENAMED = {"train_log_probs": "old_log_probs", "loss_masks": "response_masks"}
_ALONE = {"cp_rank": 0, "cp_size": 1, "cp_group": None}
"""Hooks see whole responses: to one that asks, there is no context parallelism."""


def _importance_weights(reference: str, found: Any, parameters: dict[str, _P]) -> Any:  # noqa: ARG001
    """Renamed keywords, a context-parallel place, and the form that returns weights instead of a loss."""
    names = {p.name for p in parameters.values() if p.kind in _BY_NAME}
    takes_any = any(p.kind is _P.VAR_KEYWORD for p in parameters.values())
    renamed = {ours: old for ours, old in _RENAMED.items() if old in names and ours not in names}
    alone = {name: value for name, value in _ALONE.items() if name in names}
    returns_weights = {"train_log_probs", "rollout_log_probs"} <= names | set(renamed) and "pg_loss" not in names

    def older(ours: dict[str, Any]) -> dict[str, Any]:
        given = {**{renamed.get(name, name): value for name, value in ours.items()}, **alone}
        return {name: value for name, value in given.items() if takes_any or name in names}

    if not (renamed or alone or returns_weights) or not _fits(found, **older(dict.fromkeys(_TIS))):
        return found

    def weights(
        args: Any, *, pg_loss: Any, train_log_probs: Any, rollout_log_probs: Any, loss_masks: Any, total_lengths: Any,
        response_lengths: Any, parallel_state: Any, max_seq_lens: Any,
    ) -> Any:  # fmt: skip
        values = (
            args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths,
            parallel_state, max_seq_lens,
        )  # fmt: skip
        result = found(**older(dict(zip(_TIS, values, strict=True))))
        if isinstance(result, tuple) and len(result) == 2:  # noqa: PLR2004
            return pg_loss * result[0], loss_masks, result[1]
        return result

    return _like(found, weights)


def _agent(reference: str, found: Any, parameters: dict[str, _P]) -> Any:  # noqa: ARG001
    """All four are passed by keyword there, so their order is free."""
    names = ("base_url", "prompt", "request_kwargs", "metadata")
    by_name = [name for name in names if name in parameters and parameters[name].kind in _BY_NAME]
    if tuple(_plain(parameters)[:4]) == names or len(by_name) < len(names):
        return found
    if not _fits(found, **dict.fromkeys(names)):
        return found

    async def agent(base_url: str, prompt: Any, request_kwargs: Any, metadata: Any, /, **kwargs: Any) -> Any:
        return await found(base_url=base_url, prompt=prompt, request_kwargs=request_kwargs, metadata=metadata, **kwargs)

    return _like(found, agent, agent) if is_async(found) else found


_ADAPTERS: dict[str, Callable[[str, Any, dict[str, _P]], Any]] = {
    "rollout": _rollout,
    "eval_rollout": _rollout,
    "generate": _generate,
    "convert_samples": _convert_samples,
    "rollout_data_postprocess": _rollout_data_postprocess,
    "loss": _loss,
    "importance_weights": _importance_weights,
    "agent": _agent,
}
