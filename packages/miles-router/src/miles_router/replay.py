"""`miles router --replay FILE`: recorded requests get their recorded answers, without a model.

A request is known by method, path, query and body. The n-th equal request gets the n-th recorded answer. One that was
never recorded is a 404 that names the nearest, one too many of a kind a 409: a replay never makes anything up.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .access import allowed_methods
from .app import RouterApp
from .messages import read_body, send_json
from .recording import read_exchange, read_recording, target_of

if TYPE_CHECKING:
    from .messages import Receive, Scope, Send
    from .options import RouterOptions
    from .recording import Exchange

__all__ = ["ReplayApp"]

_SHOWN = 60
"""How many bytes of two bodies are shown from shortly before where they differ."""
_COMPARED = 100
"""With how many recorded bodies a missed one is compared: other requests wait meanwhile."""


class _Place(NamedTuple):
    start: int
    length: int


class ReplayApp(RouterApp):
    """A router whose engines are a file. Its token, its limits and `/health` are those of any router."""

    def __init__(self, options: RouterOptions, path: str) -> None:
        """Read what was recorded; cut-off answers are left out. Raises `DataError`."""
        super().__init__(options)
        self.lane = None  # no request goes a way of its own to an engine
        self._limit = options.router_max_body_bytes
        self._path = path
        self._answers: dict[bytes, list[_Place]] = {}
        self._alike: dict[tuple[str, bytes], list[_Place]] = {}
        self._given: dict[bytes, int] = {}
        for start, length, exchange in read_recording(path):
            if not exchange.complete:
                continue
            place = _Place(start, length)
            self._answers.setdefault(_key(exchange.method, exchange.target, exchange.request), []).append(place)
            self._alike.setdefault((exchange.method, exchange.target), []).append(place)
        self._file = Path(path).open("rb")  # noqa: SIM115  as long as the process

    async def _health(self, send: Send) -> None:
        await send_json(send, 200, {"status": "healthy", "replay": self._path, "recorded": self.recorded})

    async def close(self) -> None:
        """Stop the background tasks and close the recording."""
        await super().close()
        self._file.close()

    @property
    def recorded(self) -> int:
        """How many answers there are."""
        return sum(map(len, self._alike.values()))

    async def _admit(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in allowed_methods(path):
            await super()._admit(path, scope, receive, send)
            return
        body = await read_body(receive, self._limit)
        if body is None:
            return
        method, target = scope["method"], target_of(scope)
        key = _key(method, target, body)
        places, turn = self._answers.get(key, []), self._given.get(key, 0)
        if turn < len(places):
            self._given[key] = turn + 1
            await _answer(send, read_exchange(self._file, *places[turn]))
        elif places:
            times = f"{len(places)} time{'s' if len(places) > 1 else ''}"
            text = f"{method} {target.decode('latin-1')} with this body was recorded {times}, this is one more"
            await self.refuse(send, 409, text)
        else:
            await self.refuse(send, 404, self._miss(method, target, body))

    def _miss(self, method: str, target: bytes, body: bytes) -> str:
        """Say what was asked, and which recorded request comes nearest to it."""
        asked = f"{method} {target.decode('latin-1')} with this body of {len(body)} bytes was not recorded"
        alike = self._alike.get((method, target))
        if not alike:
            known = sorted({f"{method} {target.decode('latin-1')}" for method, target in self._alike})
            return f"{asked}, nor any other body there; recorded: {', '.join(known) or 'nothing'}"
        number, equal, nearest = 0, -1, b""
        for i, place in enumerate(alike[:_COMPARED], 1):
            other = read_exchange(self._file, *place).request
            if (common := _common(other, body)) > equal:
                number, equal, nearest = i, common, other
        start = max(equal - _SHOWN // 3, 0)
        there, here = nearest[start : start + _SHOWN], body[start : start + _SHOWN]
        first = f"the first {_COMPARED} of " if len(alike) > _COMPARED else ""
        return (
            f"{asked}; nearest of {first}{len(alike)} there is the {number}., equal up to byte {equal}: "
            f"{there.decode(errors='replace')!r} was recorded, {here.decode(errors='replace')!r} was asked"
        )


def _common(a: bytes, b: bytes) -> int:
    """Return how many bytes two bodies begin with alike, by halves that are compared whole."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _key(method: str, target: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (method.encode(), target, body):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


async def _answer(send: Send, exchange: Exchange) -> None:
    await send({"type": "http.response.start", "status": exchange.status, "headers": exchange.headers})
    for piece in exchange.pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
