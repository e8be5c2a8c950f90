"""Which rollout runs in this process, for code that is handed nothing but `args` or a URL: hooks of older stacks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_rollout.state import State

__all__ = ["announce", "announced", "claim", "in_a_loop", "newest", "of_loop", "of_this_loop"]

_states: WeakKeyDictionary[asyncio.AbstractEventLoop, State] = WeakKeyDictionary()
_latest: dict[str, State | Args] = {}


def announce(args: Args) -> None:
    """Note the options of this process's rollout, router address and token included."""
    _latest["args"] = args


def announced() -> Args | None:
    """Return the options of this process's rollout; None before it starts."""
    return _latest.get("args")  # type: ignore[return-value]


def claim(state: State) -> None:
    """Note that `state`, which lives in one event loop, is that of the running one."""
    _states[asyncio.get_running_loop()] = state
    _latest["state"] = state


def in_a_loop() -> bool:
    """Say whether an event loop runs in this thread."""
    return asyncio._get_running_loop() is not None


def of_this_loop() -> State | None:
    """Return the state of the running event loop; None without a loop or before it has one."""
    return _states.get(asyncio.get_running_loop()) if in_a_loop() else None


def of_loop(loop: asyncio.AbstractEventLoop) -> State | None:
    """Return the state of an event loop; None before it has one."""
    return _states.get(loop)


def newest() -> State | None:
    """Return the state that was claimed last, of whatever loop."""
    return _latest.get("state")  # type: ignore[return-value]
