"""Does a middleware answer or pass on every request, chunk by chunk, and leave the tokens alone?"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.testing.case import case

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_CHUNKS = 3
_PAYLOAD = {"input_ids": [4, 5, 6], "sampling_params": {"max_new_tokens": 8}, "return_logprob": True}
_TOKENS = ("text", "output_ids")


class _App:
    """The router's stand-in: answers `/generate` from an engine, whole or in chunks, and notes what reached it."""

    def __init__(self, trial: Trial) -> None:
        self._engine = trial.engine
        self.scopes: list[dict[str, Any]] = []
        self.streaming = False
        self.sent: list[int] = []
        """For each chunk, how many messages had come out at the other end when the next one was due."""
        self.outside: list[dict[str, Any]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        body = await _read(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        if self.streaming:
            for number in range(_CHUNKS):
                await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
                self.sent.append(len(self.outside))
            await send({"type": "http.response.body", "body": b""})
            return
        reply = self._engine.answer(scope["path"], msgspec.json.decode(body))
        await send({"type": "http.response.body", "body": msgspec.json.encode(reply)})


async def _read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


@case("router_middleware", left_out="the router around it: its engines, its token, requests that the router refuses")
def _router_middleware(trial: Trial) -> None:
    app = _App(trial)
    workers: list[Any] = []
    router = SimpleNamespace(
        workers=workers, loads={}, versions={}, options=trial.args, args=trial.args, prefer=_prefer, choose=_prefer
    )
    hook = trial.hook
    with trial.check("is built"):
        trial.hook = hook.calling(trial.guarded(lambda: hook(app, router=router)))
    with trial.check("answers a request or passes it on"):
        _require_tokens(trial, app, _request(trial, app, _PAYLOAD))
    with trial.check("serves several requests at once"):
        _many(trial, app)
    with trial.check("passes a streamed answer on chunk by chunk"):
        app.streaming = True
        sent = _request(trial, app, _PAYLOAD)
        if app.sent:
            text = b"".join(message.get("body", b"") for message in sent[1:])
            trial.require(text == b"data: 0\n\ndata: 1\n\ndata: 2\n\n", f"the streamed body came out as {text!r:.80}")
            early = all(count > number + 1 for number, count in enumerate(app.sent))
            trial.require(early, "held a chunk back until the next one came: pass each on as it is sent")
    with trial.check("leaves what is no HTTP request alone"):
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
        trial.together([(scope, _nothing, _nothing)])
        passed = any(other is scope or other == scope for other in app.scopes)
        trial.require(passed, "did not pass the lifespan scope on: `if scope['type'] != 'http': await app(…)`")


def _prefer(_scope: dict[str, Any], *_urls: str) -> None:
    """Take a wish; there is no engine to choose."""


def _scope() -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 30000),
    }  # fmt: skip


def _request(trial: Trial, app: _App, payload: Any) -> list[dict[str, Any]]:
    """Send one request through the middleware; return the messages of its answer."""
    app.outside = []
    trial.together([(_scope(), _body_of(payload), _noting(app.outside))])
    _require_answer(trial, app.outside)
    return app.outside


def _many(trial: Trial, app: _App) -> None:
    payloads = [{**_PAYLOAD, "input_ids": [20 + i, 40 + i, 60 + i]} for i in range(3)]
    answers: list[list[dict[str, Any]]] = [[] for _ in payloads]
    calls = [(_scope(), _body_of(p), _noting(answer)) for p, answer in zip(payloads, answers, strict=True)]
    before = len(app.scopes)
    trial.together(calls)
    for payload, answer in zip(payloads, answers, strict=True):
        _require_answer(trial, answer)
        if len(app.scopes) == before + len(payloads):
            reply = _reply(trial, answer)
            own = reply.get("output_ids") == payload["input_ids"] or getattr(trial.hook.target, "changes_tokens", False)
            trial.require(own, "gave one request the answer of another")


def _require_answer(trial: Trial, messages: list[dict[str, Any]]) -> None:
    kinds = [message["type"] for message in messages]
    trial.require(kinds, "neither answered nor passed the request on")
    in_order = kinds[0] == "http.response.start" and set(kinds[1:]) == {"http.response.body"}
    trial.require(in_order, f"sent {kinds}, not a start and then a body")
    ended = [not message.get("more_body", False) for message in messages[1:]]
    trial.require(ended[-1] and not any(ended[:-1]), "did not end its answer, or sent more after the end")


def _require_tokens(trial: Trial, app: _App, messages: list[dict[str, Any]]) -> None:
    """Fail where a middleware that passed the request on changed what the engine said and does not declare it."""
    if not app.scopes or getattr(trial.hook.target, "changes_tokens", False):
        return
    reply, expected = _reply(trial, messages), trial.engine.answer("/generate", _PAYLOAD)
    for key in _TOKENS:
        trial.require(
            reply.get(key) == expected[key],
            "differs from what the engine said; declare changes_tokens = True",
            field=key,
        )


def _reply(trial: Trial, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = b"".join(message.get("body", b"") for message in messages[1:])
    try:
        reply = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        trial.fail(f"the answer is not the engine's JSON any more: {body!r:.80}", cause=error)
    trial.require(isinstance(reply, dict), f"the answer is not the engine's JSON object any more: {body!r:.80}")
    return reply


def _body_of(payload: Any) -> Any:
    messages = [{"type": "http.request", "body": msgspec.json.encode(payload), "more_body": False}]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive


def _noting(into: list[dict[str, Any]]) -> Any:
    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        into.append(message)

    return send


async def _nothing(*_message: Any) -> dict[str, Any]:
    return {"type": "lifespan.startup"}
