"""What the router can know to be wrong before anything starts: its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import problem_of
from miles_api.run_options import RunOptions
from miles_router.listening import bind
from miles_router.options import MIDDLEWARE_HOOK, RouterOptions, check_binding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["HOOKS", "check", "idle"]

HOOKS: frozenset[str] = frozenset({MIDDLEWARE_HOOK})
"""The hooks that this package calls."""


def idle(config: RunConfig) -> dict[str, str]:
    """Return the hooks of this package that a run does not call, by name, with the reason."""
    run = config.group(RunOptions)
    if run.loss_type == "sft_loss":
        return {MIDDLEWARE_HOOK: "supervised, no router starts"}
    return {MIDDLEWARE_HOOK: "recorded rollouts, no router starts"} if run.load_debug_rollout_data else {}


def check(config: RunConfig) -> Iterator[str]:
    """Yield a problem if the address needs a token that is not set, or is taken."""
    options = config.group(RouterOptions)

    def listen() -> None:
        check_binding(options)
        bind(options.sglang_router_ip, options.sglang_router_port).close()

    yield from problem_of(listen)
