"""What can be known to be wrong before a start about hooks of this package and options of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import problem_of
from miles_api.loading.hookset import HookSet, configured_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["HOOKS", "check", "idle"]

HOOKS: frozenset[str] = frozenset()
"""The hooks that this package calls: it brings hooks and calls none."""

_OWN_BOUNDS = {
    "icepop": "--icepop-alpha and --icepop-beta",
    "mis": "--tis-lower-bound and --tis-upper-bound",
    "seq_mis": "--seq-mis-lower-bound and --seq-mis-upper-bound",
}
"""Importance weights that do not read --tis-clip, with what they read."""


_BUILT_TO_BE_CHECKED = {
    "reward": ("code_execution", "llm_judge"),
    "reward_post_process": ("dapo_overlong", "leave_one_out", "pass_at_k"),
}
"""Hooks whose own constructors say what cannot work, and cost next to nothing, by the hook they implement."""


def idle(_config: RunConfig) -> dict[str, str]:
    """Return nothing: hooks are idle when those who call them say so."""
    return {}


def check(config: RunConfig) -> Iterator[str]:
    """Yield what hooks refuse when they are built, and options that contradict importance weights or go unread."""
    args = config.args
    for name, ours in _BUILT_TO_BE_CHECKED.items():
        if set(configured_hooks(args).get(name, ())) & set(ours):
            yield from problem_of(lambda hook=name: HookSet(args, [hook]))
    [weights, *_] = [*configured_hooks(args).get("importance_weights", ()), ""]
    if weights not in {*_OWN_BOUNDS, "tis"}:
        return
    hook = f"--custom-tis-function-path {weights}"
    if args.use_tis and args.use_rollout_logprobs:
        yield (
            f"--use-rollout-logprobs with {hook} would correct twice: the policy's ratio already compares with the "
            "engine's log-probs. Leave it out: old log-probs are then recomputed, and the weights compare them with "
            "the engine's"
        )
    unread = [name for name in ("tis_clip", "tis_clip_low") if name in config.sources and weights in _OWN_BOUNDS]
    if unread:
        yield f"--{unread[0].replace('_', '-')} is not read by {hook}: set {_OWN_BOUNDS[weights]}"
