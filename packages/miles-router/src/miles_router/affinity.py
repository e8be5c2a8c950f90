"""Requests with the same key go to the same engine, whose cache knows what came before.

The key is what the header `X-SMG-Routing-Key` holds, as for SGLang's router; a request without one goes to the engine
with the fewest requests under way.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from .policies import LeastOutstanding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .policies import RouteRequest
    from .workers import Worker

__all__ = ["ROUTING_KEY", "SESSION_ID", "ConsistentHashing", "Sticky"]

ROUTING_KEY = b"x-smg-routing-key"
SESSION_ID = b"x-session-id"
"""What `Sticky` takes where there is no routing key."""

_POINTS = 128
"""Points of each worker on the ring: shares differ by about a tenth (1/√128)."""
_MAX_SESSIONS = 100_000
"""Sessions remembered, the longest unused forgotten first: about 20 MB."""


def _place(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


class Members(Protocol):
    """What these policies ask a `WorkerRegistry`."""

    urls: frozenset[str]
    healthy: list[Worker]


class ConsistentHashing:
    """Hash keys onto a ring of workers (Karger et al. 1997): when one comes or goes, only its own keys move."""

    def __init__(self, members: Members) -> None:
        self._fallback = LeastOutstanding()
        self._members = members
        self._on_ring: frozenset[str] = frozenset()
        self._places: list[int] = []
        self._urls: list[str] = []

    def choose(self, workers: Sequence[Worker], request: RouteRequest, /) -> Worker:
        """Return the worker whose point follows that of the request's key; one that may not get it is passed over."""
        key = request.header(ROUTING_KEY)
        if not key or len(workers) == 1:
            return self._fallback.choose(workers, request)
        if self._members.urls is not self._on_ring:
            self._build(self._members.urls)
        by_url = {worker.url: worker for worker in workers}
        start = bisect.bisect(self._places, _place(key))
        for index in range(start, start + len(self._urls)):
            worker = by_url.get(self._urls[index % len(self._urls)])
            if worker is not None:
                return worker
        raise AssertionError("every candidate is on the ring")

    def _build(self, urls: frozenset[str]) -> None:
        self._on_ring = urls
        points = sorted((_place(f"{url}#{n}".encode()), url) for url in urls for n in range(_POINTS))
        self._places, self._urls = [place for place, _ in points], [url for _, url in points]


class Sticky:
    """Keep each session, named by `X-SMG-Routing-Key` or `X-Session-Id`, where its first request went.

    The first request goes to the engine with the fewest requests under way; so does the next one after that engine was
    quarantined or removed, and there the session then stays. Where its engine is healthy but may not get a request,
    full or not among those chosen, that request alone goes elsewhere.
    """

    def __init__(self, members: Members, max_sessions: int = _MAX_SESSIONS) -> None:
        self._fallback = LeastOutstanding()
        self._members = members
        self._max_sessions = max_sessions
        self._url_of: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, workers: Sequence[Worker], request: RouteRequest, /) -> Worker:
        """Return the session's worker."""
        key = request.header(ROUTING_KEY) or request.header(SESSION_ID)
        if not key:
            return self._fallback.choose(workers, request)
        session = hashlib.blake2b(key, digest_size=16).digest()  # keys may be long
        url = self._url_of.get(session)
        if url is not None:
            self._url_of.move_to_end(session)
            for worker in workers:
                if worker.url == url:
                    return worker
        chosen = self._fallback.choose(workers, request)
        if url is None or all(worker.url != url for worker in self._members.healthy):
            self._url_of[session] = chosen.url
            if len(self._url_of) > self._max_sessions:
                self._url_of.popitem(last=False)
        return chosen
