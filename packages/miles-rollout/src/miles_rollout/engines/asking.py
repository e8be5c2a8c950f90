"""A question to an engine, on loopback or not, never through a proxy."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import msgspec

from miles_rollout.engines.key import header_of
from miles_rollout.engines.protocol import ModelInfo

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["REQUEST_TIMEOUT", "model_info", "request", "with_version"]

REQUEST_TIMEOUT = 30.0
# Whatever http_proxy says: a proxy elsewhere knows no loopback address of ours. Making it takes half as long as asking.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def request(url: str, body: dict[str, Any] | None, timeout: float, key: str = "") -> dict[str, Any]:
    """POST `body`, or GET without one; return the JSON object that is answered, empty where there is none.

    `key` is the engine's, where it asks for one.
    Raises `OSError`: `urllib.error.HTTPError` for an answer that says no, others for an engine that does not answer.
    """
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"content-type": "application/json"})
    for name, value in header_of(key).items():
        asked.add_unredirected_header(name, value)
    try:
        with _DIRECT.open(asked, timeout=timeout) as reply:
            answer = reply.read()
    except HTTPException as error:
        raise ConnectionError(f"the engine broke off its answer: {error!r}") from error
    # SGLang answers /health with nothing.
    return _object(url, answer) if answer.strip() else {}


def _object(url: str, answer: bytes) -> dict[str, Any]:
    try:
        value = json.loads(answer)
    except ValueError:
        # SGLang answers some of what it was told to do in words.
        value = {"message": answer[:500].decode(errors="replace")}
    if not isinstance(value, dict):
        raise ConnectionError(f"{url} answers with no object: {answer[:200]!r}")
    return value


def model_info(url: str, key: str = "") -> ModelInfo:
    """Ask the engine at `url` what it serves. Raises `OSError` as `request` does, and for what is no such answer."""
    try:
        return msgspec.convert(request(url + "/model_info", None, REQUEST_TIMEOUT, key), ModelInfo)
    except msgspec.ValidationError as error:
        raise ConnectionError(f"{url} answers /model_info otherwise than SGLang: {error}") from None


def with_version(endpoint: Endpoint) -> Endpoint:
    """Return `endpoint` with the weight version that the engine reports; without one if it does not answer."""
    version = ""
    with contextlib.suppress(OSError):
        version = model_info(endpoint.url, endpoint.key).weight_version
    # SGLang's name for weights that were never synchronised.
    return msgspec.structs.replace(endpoint, weight_version="" if version == "default" else version)
