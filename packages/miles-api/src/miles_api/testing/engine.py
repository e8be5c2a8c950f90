"""An inference engine without a model: answers `/generate` and chat completions in memory, or over HTTP."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from miles_api.testing.samples import text_of
from miles_api.testing.tokenizer import ByteTokenizer

__all__ = ["Engine", "apart"]

_ANSWER_TOKENS = 3
_LOG_PROB = -0.25
_NOT_FOUND, _BAD_REQUEST = 404, 400


class Engine:
    """Says the beginning of each prompt again, so that its ids are in any tokenizer's vocabulary.

    Use it as a context manager to serve it at `url`; `requests` holds what was asked, as (path, payload), one for each
    prompt of a request with several.
    """

    def __init__(self, weight_version: str = "1") -> None:
        self.weight_version = weight_version
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.url = ""
        """`http://127.0.0.1:port` while it is served."""
        self._tokenizer = ByteTokenizer()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Engine:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(200, {"status": "ok"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    self._reply(200, engine.answer(self.path, msgspec.json.decode(body or b"{}")))
                except LookupError as error:
                    self._reply(_NOT_FOUND, {"error": {"message": str(error)}})
                except (msgspec.DecodeError, ValueError, TypeError) as error:
                    self._reply(_BAD_REQUEST, {"error": {"message": str(error)}})

            def _reply(self, status: int, value: Any) -> None:
                body = msgspec.json.encode(value)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None: ...  # clients may hang up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, payload: dict[str, Any]) -> Any:
        """Return the reply to one request, or the list of replies to several prompts with parameters of their own.

        Raises `LookupError` for a path that no engine has, `ValueError` for a bad request.
        """
        if path == "/generate" and (parts := apart(payload)) is not None:
            return [self.answer(path, part) for part in parts]
        self.requests.append((path, payload))
        if path == "/generate":
            return self._generate(payload)
        if path.endswith("/chat/completions"):
            return self._chat(payload)
        raise LookupError(f"the engine has no {path}")

    def _generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        ids = payload.get("input_ids")
        if ids is None and isinstance(payload.get("text"), str):
            ids = self._tokenizer.encode(payload["text"])
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise ValueError("`/generate` needs `input_ids`, a list of at least one whole number, or `text`")
        params = payload.get("sampling_params") or {}
        room = params.get("max_new_tokens", _ANSWER_TOKENS)
        output = ids[: min(_ANSWER_TOKENS, room)]
        reason = {"type": "stop", "matched": None} if room > len(output) else {"type": "length", "length": room}
        meta: dict[str, Any] = {
            "id": f"request-{len(self.requests)}", "finish_reason": reason, "weight_version": self.weight_version,
            "prompt_tokens": len(ids), "completion_tokens": len(output), "cached_tokens": 0,
        }  # fmt: skip
        if payload.get("return_logprob"):
            meta["output_token_logprobs"] = [[_LOG_PROB, token, None] for token in output]
        return {"text": self._tokenizer.decode(output), "output_ids": output, "meta_info": meta}

    def _chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        messages = payload.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("a chat completion needs `messages`")
        if payload.get("stream"):
            raise ValueError("a session does not stream")
        prompt = self._tokenizer.encode(text_of(messages))
        content = self._tokenizer.decode(prompt[:_ANSWER_TOKENS])
        used = {"prompt_tokens": len(prompt), "completion_tokens": _ANSWER_TOKENS}
        return {
            "id": f"chatcmpl-{len(self.requests)}", "object": "chat.completion", "created": 0,
            "model": payload.get("model", "model"),
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
            ],
            "usage": {**used, "total_tokens": sum(used.values())},
        }  # fmt: skip


def apart(payload: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return what a `/generate` request with several prompts asks for each, None for one with a single prompt."""
    ids = payload.get("input_ids")
    if not (isinstance(ids, list) and ids and isinstance(ids[0], list)):
        return None
    # What there is one of for each prompt.
    names = ("input_ids", "sampling_params", "rid")
    own = {name: payload[name] for name in names if isinstance(payload.get(name), list)}
    return [payload | dict(zip(own, values, strict=True)) for values in zip(*own.values(), strict=True)]
