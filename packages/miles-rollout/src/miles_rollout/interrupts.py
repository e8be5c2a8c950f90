"""Generations that are ended before they are done, so that they go on in a later rollout: `--partial-rollout`."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import aiohttp

from miles_api.errors import ServiceError
from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from miles_api.rollout_types import Group
    from miles_rollout.requests import Requests

__all__ = ["Interrupts", "is_done", "is_unfinished", "left_of"]

_GENERATE, _ABORT = "/generate", "/abort_request"
_AGAIN = 0.2
"""Seconds after which engines are told once more: a request may reach its engine after the first word did."""
_UNKNOWN = frozenset({400, 401, 403, 404, 405})
_DONE = frozenset({Status.COMPLETED, Status.TRUNCATED, Status.FAILED})


class Interrupts:
    """Names the requests of one rollout process, so that engines can be told to end these and no others."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._running: set[str] = set()
        """Ids of what is at engines, or on its way."""

    @contextmanager
    def named(self, path: str, payload: Any) -> Iterator[Callable[[], Any]]:
        """Give a function that returns the body of a request, to be called each time it is sent; it ends with the body.

        That of a generation request has a new id each time, or one for each of its prompts: SGLang refuses an id that
        it still has. Another request's is `payload`, and so is that of one which has ids.
        """
        if path != _GENERATE or not isinstance(payload, dict) or "rid" in payload:
            yield lambda: payload
            return
        mine: set[str] = set()

        def body() -> dict[str, Any]:
            prompts = _prompts(payload)
            # None begins with another: SGLang ends all whose ids begin with the one that it is told.
            ids = [uuid.uuid4().hex for _ in prompts or [None]]
            mine.update(ids)
            self._running.update(ids)
            return {**payload, "rid": ids[0] if prompts is None else ids}

        try:
            yield body
        finally:
            self._running -= mine

    def refusal(self, path: str, payload: Any) -> Any:
        """Return what an engine would answer to a generation that was aborted before its first token.

        None for another request.
        """
        if path != _GENERATE or not isinstance(payload, dict):
            return None
        prompts = _prompts(payload)
        return _aborted(payload.get("input_ids")) if prompts is None else [_aborted(ids) for ids in prompts]

    async def end(self, tasks: Iterable[asyncio.Future[Any]], patience: float) -> None:
        """End what `tasks` have at engines, and wait until they have taken what came back, at most `patience` seconds.

        Raises `ServiceError` where the router does not know how to tell engines.
        """
        loop = asyncio.get_running_loop()
        deadline, left = loop.time() + patience, set(tasks)
        while left and (remaining := deadline - loop.time()) > 0:
            # A router that dies is replaced, and is told again.
            with suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(remaining):
                    await self._tell()
            _, left = await asyncio.wait(left, timeout=max(min(_AGAIN, deadline - loop.time()), 0.0))

    async def _tell(self) -> None:
        # By whole ids: SGLang's server passes on none that it has not, so no beginning of several.
        async with self._requests.aside() as session:
            await asyncio.gather(*(self._tell_of(rid, session) for rid in self._running))

    async def _tell_of(self, rid: str, session: aiohttp.ClientSession) -> None:
        url = self._requests.url + _ABORT
        async with session.post(url, json={"rid": rid}) as reply:
            text = await reply.text()
        if reply.status in _UNKNOWN:
            raise ServiceError(
                f"{url} answered {reply.status}: {text[:500]}: --partial-rollout needs a router that passes it on to "
                "its engines"
            )


def is_done(sample: Sample) -> bool:
    """Say whether a sample that comes from the buffer has its whole response."""
    return sample.response_length > 0 and (sample.status in _DONE or sample.reward is not None)


def is_unfinished(sample: Sample) -> bool:
    """Say whether a sample of an interrupted generation has to go on: it was cut, or never begun."""
    return sample.status is Status.ABORTED or (sample.status is Status.PENDING and sample.response_length == 0)


def left_of(result: Group, original: Group) -> Group:
    """Return what goes on of an interrupted group that was `original`.

    What a generation has fanned out is one generation no more: unless all of it is done, it starts anew.
    """
    return [_left_of(made, given) for made, given in zip(result, original, strict=True)]


def _left_of(made: Sample | list[Sample], given: Sample | list[Sample]) -> Sample | list[Sample]:
    if isinstance(made, Sample):
        return made if isinstance(given, Sample) else given
    return given if any(is_unfinished(sample) for sample in made) else made


def _prompts(payload: dict[str, Any]) -> list[Any] | None:
    """Return the prompts of a request for several samples; None for one."""
    ids, text = payload.get("input_ids"), payload.get("text")
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        return ids
    return text if isinstance(text, list) else None


def _aborted(prompt: Any) -> dict[str, Any]:
    reason = {"type": "abort", "message": "the rollout has enough"}
    meta: dict[str, Any] = {"finish_reason": reason, "completion_tokens": 0, "output_token_logprobs": []}
    if isinstance(prompt, list):
        meta["prompt_tokens"] = len(prompt)
    return {"text": "", "output_ids": [], "meta_info": meta}
