"""What SGLang serves passes through as it is: an engine that speaks in SGLang's own shapes, compared byte by byte."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import os
import zlib

import pytest

_JSON, _SSE = "application/json", "text/event-stream"
# As SGLang writes them: keys in its order, and some that nobody here knows of.
_META = (
    b'{"id":"6b2f","finish_reason":{"type":"length","length":3},"prompt_tokens":4,"weight_version":"7",'
    b'"weight_versions":[["6",2],["7",1]],"total_retractions":0,"completion_tokens":3,"cached_tokens":0,'
    b'"e2e_latency":0.0371,"output_token_logprobs":[[-0.5,3,null],[-1e-07,17,null],[-Infinity,2,"\xc3\xa9"]],'
    b'"input_token_logprobs":[],"routed_experts":"%s","a key of tomorrow":{"n":123456789012345678901234567890}}'
    % base64.b64encode(bytes(range(256)))
)
_ANSWER = b'{"text":" \\u00e9 \\ud83d\xc3\xa9","output_ids":[3,17,2],"meta_info":' + _META + b"}"
_ASKED = (
    b'{"rid":"6b2f", "input_ids":[1, 2,3,4],"sampling_params":{"max_new_tokens":3,"sampling_seed":1844674407370955161,'
    b'"custom_params":{"x":NaN}},"return_logprob":true,"logprob_start_len":-1,"return_routed_experts":true,'
    b'"session_id":"s","routing_key":"k","a key of tomorrow":[1e400,-0.0]}'
)
_CHAT = (
    b'{"model":"m","messages":[{"role":"user","content":"\xc3\xa9"}],"return_token_ids":true,"logit_bias":{"3":-100}}'
)
_BINARY = bytes(range(256)) * 257


def _events(*values):
    return b"".join(b"data: %s\n\n" % value for value in (*values, b"[DONE]"))


def _refused(message):
    return b'{"success": false, "message": "%s", "num_paused_requests": 0}' % message


# method and path, body asked, status, content type, body answered
_EXCHANGES = {
    "generate": ("POST", "/generate", _ASKED, 200, _JSON, _ANSWER),
    "a batch": ("POST", "/generate", b'{"text":["a","b"]}', 200, _JSON, b"[" + _ANSWER + b"," + _ANSWER + b"]"),
    "a stream": (
        "POST", "/generate", b'{"text":"a","stream":true}', 200, _SSE + "; charset=utf-8", _events(_ANSWER, _ANSWER),
    ),
    "a stream that fails": (
        "POST", "/generate", b'{"text":"a","stream":true}', 200, _SSE,
        _events(_ANSWER, b'{"error":{"message":"aborted","code":503}}'),
    ),
    "an unknown parameter": (
        "POST", "/generate", b'{"txt":1}', 400, _JSON, b'{"error":{"message":"neither text nor input_ids"}}',
    ),
    "success false": ("POST", "/v1/load_lora", b"{}", 400, _JSON, _refused(b"not while busy")),
    "chat": (
        "POST", "/v1/chat/completions", _CHAT, 200, _JSON,
        b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":null,'
        b'"reasoning_content":"","tool_calls":[]},"token_ids":[1,2],"matched_stop":151645}],"metadata":' + _META + b"}",
    ),
    "a chat stream": (
        "POST", "/v1/chat/completions", _CHAT, 200, _SSE,
        _events(b'{"choices":[{"delta":{"role":"assistant"}}]}', b'{"choices":[{"delta":{"content":"\xc3\xa9"}}]}'),
    ),
    "completions": ("POST", "/v1/completions", b'{"prompt":[1,2]}', 200, _JSON, b'{"choices":[{"text":""}]}'),
    "embeddings": ("POST", "/v1/embeddings", b'{"input":"a"}', 200, _JSON, b'{"data":[{"embedding":[1e-38]}]}'),
    "an upload": (
        "POST", "/v1/audio/transcriptions", b"--b\r\n\r\n" + _BINARY + b"\r\n--b--\r\n", 200, _JSON, b'{"text":""}',
    ),
    "a picture": ("POST", "/v1/images/generations", b"{}", 200, "image/png", b"\x89PNG\r\n\x1a\n\x00" + _BINARY),
    "encode": ("POST", "/encode", b'{"text":"a"}', 200, _JSON, b'{"embedding":[0.1],"meta_info":{}}'),
    "classify": ("POST", "/classify", b'{"text":"a"}', 200, _JSON, b'[{"embedding":[0.1,-0.1]}]'),
    "rerank": ("POST", "/rerank", b'{"query":"a","documents":["b"]}', 200, _JSON, b'[{"score":1,"index":0}]'),
    "tokenize": ("POST", "/tokenize", b'{"prompt":"a"}', 200, _JSON, b'{"tokens":[1],"count":1,"max_model_len":9}'),
    "detokenize": ("POST", "/detokenize", b'{"tokens":[1]}', 200, _JSON, b'{"text":"a"}'),
    "model_info": ("GET", "/model_info", b"", 200, _JSON, b'{"model_path":"m","weight_version":"default"}'),
    "server_info": ("GET", "/server_info", b"", 200, _JSON, b'{"tp_size":1,"internal_states":[{"x":NaN}]}'),
    "models": ("GET", "/v1/models", b"", 200, _JSON, b'{"object":"list","data":[{"id":"m","max_model_len":4}]}'),
    "loads": ("GET", "/v1/loads?include=all", b"", 200, _JSON, b'{"loads":[{"dp_rank":0,"num_reqs":0}]}'),
    "health_generate": ("GET", "/health_generate", b"", 200, "text/plain", b""),
    "busy": ("POST", "/generate", _ASKED, 503, _JSON, b'{"error":{"message":"The request queue is full."}}'),
}  # fmt: skip


def _whole(body):
    return b"content-length: %d\r\n\r\n%b" % (len(body), body)


def _chunked(body, trailers=b""):
    cuts = [0, *range(1, len(body), max(len(body) // 3, 1)), len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(cuts) if a < b]
    sent = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"transfer-encoding: chunked\r\n\r\n" + sent + b"0\r\n" + trailers + b"\r\n"


_FRAMES = {
    "of known length": _whole,
    "chunked": _chunked,
    "chunked, with trailers": lambda body: _chunked(body, b"x-late: 1\r\nx-digest: 3\r\n"),
}


def _engine(status, kind, framed, seen, extra=b""):
    async def speak(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            lines = head.lower().split(b"\r\n")
            size = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
            seen.append((head.split(b"\r\n")[0], await reader.readexactly(size)))
            writer.write(b"HTTP/1.1 %d X\r\ncontent-type: %s\r\n%b%b" % (status, kind.encode(), extra, framed))

    return speak


@pytest.mark.parametrize("frame", _FRAMES)
@pytest.mark.parametrize("exchange", _EXCHANGES)
def test_what_is_asked_and_answered_is_the_same_on_both_sides(listen, routed, exchange, frame):
    method, path, asked, status, kind, answer = _EXCHANGES[exchange]
    seen = []

    async def main():
        async with listen(_engine(status, kind, _FRAMES[frame](answer), seen)) as url, routed(url) as r:
            for _ in range(2):
                got = await r.client.request(method, path, content=asked)
                assert (got.status_code, got.headers["content-type"], got.content) == (status, kind, answer)
                assert "x-late" not in got.headers
        assert seen == [(f"{method} {path} HTTP/1.1".encode(), asked)] * 2

    asyncio.run(main())


def test_a_body_that_its_engine_compressed_is_not_unpacked_on_the_way(listen, routed):
    packed = gzip.compress(_ANSWER)
    seen = []

    async def main():
        engine = _engine(200, _JSON, _whole(packed), seen, b"content-encoding: gzip\r\n")
        async with (
            listen(engine) as url,
            routed(url) as r,
            r.client.stream("POST", "/generate", content=zlib.compress(_ASKED)) as got,
        ):
            raw = b"".join([piece async for piece in got.aiter_raw()])
        assert (got.headers["content-encoding"], raw) == ("gzip", packed)
        assert seen[0][1] == zlib.compress(_ASKED)

    asyncio.run(main())


def test_a_long_prompt_and_its_long_answer_pass(listen, routed):
    asked, answer = os.urandom(20_000_000), os.urandom(20_000_000)
    seen = []

    async def main():
        async with listen(_engine(200, "application/octet-stream", _chunked(answer), seen)) as url, routed(url) as r:
            assert (await r.post(content=asked)).content == answer
        assert seen[0][1] == asked

    asyncio.run(main())
