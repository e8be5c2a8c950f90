"""Generations of one group that begin in the same moment travel as one request, as SGLang's protocol allows.

Most of what a small request costs is HTTP, once in each of three processes. The group waits for its slowest sample
anyway; only its scores come later, as each sample of a joint request is scored when the last one has been generated. A
joint request also holds all its slots until then: it is made only while nobody waits for a slot.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence

__all__ = ["JointRequests"]

_PATH = "/generate"


class _Call(NamedTuple):
    payload: dict[str, Any]
    answer: asyncio.Future[dict[str, Any]]


class JointRequests:
    """Collects what is asked during one turn of the event loop."""

    def __init__(
        self, post: Callable[[str, dict[str, Any]], Awaitable[Any]], may_join: Callable[[], bool], engines: int = 1
    ) -> None:
        """`post(path, payload)` sends; `may_join()` is asked once a turn.

        A group becomes as many requests as there are `engines`: a router counts requests, not what they hold.
        """
        self._post, self._may_join, self._engines = post, may_join, engines
        self._calls: dict[Hashable, list[_Call]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, key: Hashable, payload: dict[str, Any]) -> dict[str, Any]:
        """POST `payload` to `/generate`, with those of the same `key` that are asked for now; return its own reply.

        Raises what `post` raises, each caller its own copy. A request ends early when all its callers were cancelled.
        """
        loop = asyncio.get_running_loop()
        if not self._calls:
            loop.call_soon(self._send_all)
        call = _Call(payload, loop.create_future())
        self._calls.setdefault(key, []).append(call)
        return await call.answer

    def _send_all(self) -> None:
        waiting, self._calls = self._calls, {}
        together = self._may_join()
        for calls in waiting.values():
            parts = min(self._engines, len(calls)) if together else len(calls)
            for first in range(parts):
                self._start(calls[first::parts])

    def _start(self, calls: list[_Call]) -> None:
        task = asyncio.ensure_future(self._send(calls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def end_if_unwanted(_: asyncio.Future[Any]) -> None:
            if all(call.answer.cancelled() for call in calls):
                task.cancel()

        for call in calls:
            call.answer.add_done_callback(end_if_unwanted)

    async def _send(self, calls: list[_Call]) -> None:
        try:
            replies = await self._replies([call.payload for call in calls])
        except Exception as error:
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(_own(error))
            return
        for call, reply in zip(calls, replies, strict=True):
            if not call.answer.done():
                call.answer.set_result(reply)

    async def _replies(self, payloads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(payloads) == 1:
            return [await self._post(_PATH, payloads[0])]
        replies = await self._post(_PATH, _joined(payloads))
        if not isinstance(replies, list) or len(replies) != len(payloads):
            raise ServiceError(f"{_PATH} was given {len(payloads)} prompts and did not answer with as many replies")
        return replies


def _own(error: Exception) -> Exception:
    """Return a copy for one caller, who may add notes to it; the error itself where its class allows none."""
    try:
        return copy.copy(error)
    except Exception:
        return error


def _joined(payloads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one payload for several: prompts and sampling parameters as lists, the rest from the first."""
    lists = {name: [payload[name] for payload in payloads] for name in ("input_ids", "sampling_params")}
    return {**payloads[0], **lists}
