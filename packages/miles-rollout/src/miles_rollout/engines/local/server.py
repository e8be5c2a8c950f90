"""The HTTP face: a raw ASGI application. The model loop answers through one event-loop callback per step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from miles_rollout.engines.key import bears
from miles_rollout.engines.local.errors import EngineDeadError, ReleasedError, RequestError
from miles_rollout.engines.local.generate import JobFactory, decode_finished, encode_reply, make_reply
from miles_rollout.engines.protocol import GenerateRequest, Reply

if TYPE_CHECKING:
    from miles_rollout.engines.local.control import Control
    from miles_rollout.engines.local.engine import Engine
    from miles_rollout.engines.local.jobs import Job, News

__all__ = ["App"]

_DISCONNECT_WATCH_AFTER = 1.0
"""Seconds a request runs before its connection is watched; most finish sooner and never pay for it."""
_MAX_BODY = 256 << 20
_OPEN = "/health"
"""What SGLang, too, answers without its key."""

_decode_generate = msgspec.json.Decoder(GenerateRequest).decode
_encode = msgspec.json.encode
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class App:
    """The ASGI application of one engine."""

    def __init__(self, control: Control, engine: Engine, factory: JobFactory, key: str = "") -> None:
        """With a `key`, whoever does not bring it as a bearer token may ask for `/health` alone."""
        self.control, self.engine, self.factory = control, engine, factory
        self._key = key.encode()
        self._routes = control.routes()

    def deliver(self, news: News) -> None:
        """Tell the listeners of a step's jobs; runs on the event loop."""
        try:
            decode_finished(self.factory.codec, news.finished)
        except Exception as error:
            # Unanswered, these requests would wait for ever.
            for job in news.finished:
                job.error = error
        for job in news.finished:
            job.delivered = True
        for job in (*news.progressed, *news.finished):
            if job.listener is not None:
                job.listener(job)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope["path"]
        if self._key and not path.startswith(_OPEN) and not bears(scope["headers"], self._key):
            await _reply(send, 401, _encode({"error": "Unauthorized"}))
            return
        try:
            if path == "/generate" and scope["method"] in ("POST", "PUT"):
                await self._generate(receive, send)
            elif (route := self._routes.get(path)) is None:
                await _reply(send, 404, _encode({"error": {"message": f"no such endpoint: {path}"}}))
            elif scope["method"] not in route.methods:
                await _reply(send, 405, _encode({"error": {"message": f"{path} answers to {'/'.join(route.methods)}"}}))
            else:
                status, body = await route.handler(await _body(receive))
                await _reply(send, status, _encode(body))
        except RequestError as error:
            await _reply(send, 400, _encode({"error": {"message": str(error)}}))
        except (EngineDeadError, ReleasedError) as error:
            await _reply(send, 503, _encode({"error": {"message": str(error)}}))

    async def _generate(self, receive: Receive, send: Send) -> None:
        self.control.memory.require()
        try:
            request = _decode_generate(await _body(receive))
            jobs, as_list = self.factory.expand(request)
        except (RequestError, msgspec.ValidationError, msgspec.DecodeError) as error:
            await _reply(send, 400, _encode({"error": {"message": str(error)}}))
            return
        watch = _Disconnect(receive, lambda: self.control.abort_jobs(jobs))
        try:
            if request.stream:
                await self._stream(request, jobs, as_list, send)
            else:
                await self._collect(request, jobs, as_list, send)
        finally:
            watch.close()

    async def _collect(self, request: GenerateRequest, jobs: list[Job], as_list: bool, send: Send) -> None:
        finished = asyncio.get_running_loop().create_future()
        left = len(jobs)

        def on_job(_: Job) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not finished.done():
                finished.set_result(None)

        for job in jobs:
            job.listener = on_job
        self.engine.submit(jobs)
        await finished
        error = next((job.error for job in jobs if job.error is not None), None)
        if error is not None:
            await _reply(send, 500, _encode({"error": {"message": str(error) or repr(error)}}))
            return
        await _reply(send, 200, encode_reply([self._make(request, job) for job in jobs], as_list))

    async def _stream(self, request: GenerateRequest, jobs: list[Job], as_list: bool, send: Send) -> None:
        news: asyncio.Queue[int] = asyncio.Queue()
        streams = [self.factory.codec.stream(job.skip_special_tokens) for job in jobs]
        shown = [0] * len(jobs)
        for index, job in enumerate(jobs):
            job.listener = lambda _, index=index: news.put_nowait(index)
        self.engine.submit(jobs)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        running = set(range(len(jobs)))
        while running:
            index = await news.get()
            if index not in running:
                continue
            job, text = jobs[index], None
            if job.delivered:
                running.discard(index)
            else:
                count = len(job.logprobs)
                text = streams[index].push(job.output_ids[shown[index] : count], job.stop_strings)
                shown[index] = count
            if job.delivered and job.error is not None:
                await _event(send, _encode({"error": {"message": str(job.error)}}))
            else:
                await _event(send, _encode(self._make(request, job, text, index if as_list else None)))
        await _event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b""})

    def _make(self, request: GenerateRequest, job: Job, text: str | None = None, index: int | None = None) -> Reply:
        codec = self.factory.codec if request.return_text_in_logprobs else None
        version = self.engine.scheduler.weight_version
        return make_reply(job, version, text=text, with_texts=codec, index=index)


class _Disconnect:
    """Aborts a request whose client has gone, once it has run for a while."""

    def __init__(self, receive: Receive, abort: Callable[[], None]) -> None:
        self._receive, self._abort = receive, abort
        self._task: asyncio.Task | None = None
        self._timer = asyncio.get_running_loop().call_later(_DISCONNECT_WATCH_AFTER, self._begin)

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._abort()

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


async def _body(receive: Receive) -> bytes:
    message = await receive()
    body = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BODY:
            raise RequestError(f"the request body is longer than {_MAX_BODY} bytes")
    return body


async def _reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _event(send: Send, payload: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + payload + b"\n\n", "more_body": True})
