"""Write requests and answers to a file, from which `miles router --replay` answers without a model.

Bodies go to a thread of their own as they are; the event loop never waits for the disk. What would exceed the memory
that they may take is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Annotated

import msgspec

from miles_api.options import Options, OutputPath, options_from
from miles_router.access import allowed_methods
from miles_router.recording import Exchange, RecordingWriter, target_of

if TYPE_CHECKING:
    from miles_router.handle import RouterHandle
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["Recorder", "RecorderOptions"]

_log = logging.getLogger("miles_router")


_OVERHEAD = 512
"""Bytes that an exchange takes beside its bodies."""


class RecorderOptions(Options, frozen=True, kw_only=True):
    """What the recorder keeps: every body that is forwarded and every answer to it, prompts and responses included."""

    recorder_path: OutputPath = "router-recording.msgpack"
    """The recording; continued if it exists."""
    recorder_max_bytes: Annotated[int, msgspec.Meta(ge=1)] = 256 << 20
    """Bytes that may wait in memory to be written; what exceeds them is not recorded, and counted."""


class Recorder:
    """Records what is forwarded to the engines, with the answers. Tokens stay what they are."""

    options = RecorderOptions
    changes_tokens = False

    def __init__(self, app: App, *, router: RouterHandle) -> None:
        """Open the recording. Raises `DataError` if it cannot be written."""
        mine: RecorderOptions = options_from(router.args, RecorderOptions)
        self._app = app
        self._path, self._limit = mine.recorder_path, mine.recorder_max_bytes
        self._dropped = self._taken = 0
        self._thread = _WriterThread(mine.recorder_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record it when its answer is over."""
        if scope["type"] != "http" or scope["method"] not in allowed_methods(scope["path"]):
            await self._app(scope, receive, send)
            return
        taken = _Taken(self._reserve)
        try:
            await self._app(scope, taken.receiving(receive), taken.sending(send))
        finally:
            self._taken -= taken.size
            if taken.too_much:
                self._drop()
            elif taken.status:
                self._hand_over(taken, scope)

    def counts(self) -> dict[str, int]:
        """Say how many exchanges were recorded and dropped, and how many bytes wait."""
        lost = self._thread.failed
        return {"recorded": self._thread.written, "dropped": self._dropped + lost, "waiting_bytes": self._waiting()}

    async def aclose(self) -> None:
        """Write what waits, close the file, and say what it holds."""
        await asyncio.to_thread(self._thread.close)
        counts = self.counts()
        print(f"recorder: {counts['recorded']} exchanges in {self._path}, {counts['dropped']} dropped", flush=True)

    def _waiting(self) -> int:
        return self._taken + self._thread.given - self._thread.done

    def _reserve(self, size: int) -> bool:
        if self._waiting() + size > self._limit:
            return False
        self._taken += size
        return True

    def _hand_over(self, taken: _Taken, scope: Scope) -> None:
        exchange = Exchange(
            at=taken.at,
            seconds=time.perf_counter() - taken.started,
            method=scope["method"],
            target=target_of(scope),
            request=b"".join(taken.request),
            status=taken.status,
            headers=[(name, value) for name, value in taken.headers if name.lower() != b"set-cookie"],
            pieces=taken.pieces,
            complete=taken.complete and taken.read,
        )
        self._thread.give(exchange, taken.size)

    def _drop(self) -> None:
        self._dropped += 1
        if self._dropped.bit_count() == 1:
            advice = f"more than --recorder-max-bytes {self._limit} waited for {self._path}"
            _log.warning("recorder: %d exchanges were not recorded so far: %s", self._dropped, advice)


class _Taken:
    """One exchange while it lasts; holds nothing more once it had no room."""

    def __init__(self, reserve: _Reserve) -> None:
        self._reserve = reserve
        self.at, self.started = time.time(), time.perf_counter()
        self.request: list[bytes] = []
        self.pieces: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.complete = self.read = False
        self.too_much = not reserve(_OVERHEAD)
        self.size = 0 if self.too_much else _OVERHEAD

    def receiving(self, receive: Receive) -> Receive:
        async def noting() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._keep(self.request, message.get("body", b""))
                self.read = not message.get("more_body", False)
            return message

        return noting

    def sending(self, send: Send) -> Send:
        async def noting(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], list(message.get("headers", ()))
            else:
                self._keep(self.pieces, message.get("body", b""))
                self.complete = not message.get("more_body", False)

        return noting

    def _keep(self, into: list[bytes], piece: bytes) -> None:
        if self.too_much or not piece:
            return
        self.too_much = not self._reserve(len(piece))
        if self.too_much:
            self.request.clear()
            self.pieces.clear()
        else:
            self.size += len(piece)
            into.append(piece)


class _WriterThread:
    """Writes what it is given, in order. `given` belongs to the giving thread, `done` to this one, so neither locks."""

    def __init__(self, path: str) -> None:
        self._writer = RecordingWriter(path)
        self._queue: queue.SimpleQueue[tuple[Exchange, int] | None] = queue.SimpleQueue()
        self.given = self.done = self.written = self.failed = 0
        self._thread = threading.Thread(target=self._work, name="miles-router-recorder", daemon=True)
        self._thread.start()

    def give(self, exchange: Exchange, size: int) -> None:
        self.given += size
        self._queue.put((exchange, size))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._write(*item)
        self._writer.close()

    def _write(self, exchange: Exchange, size: int) -> None:
        try:
            self._writer.write(exchange)
            self.written += 1
        except OSError as error:  # a full disk: it may have room again, and requests go on meanwhile
            self.failed += 1
            if self.failed.bit_count() == 1:
                _log.error("recorder: %d exchanges could not be written so far: %s", self.failed, error)
        self.done += size


if TYPE_CHECKING:
    from collections.abc import Callable

    _Reserve = Callable[[int], bool]
