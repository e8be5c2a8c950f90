"""Requests to one engine, directly: weights and what proves them never go through the router."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["EngineGoneError", "RefusedError", "ask", "tell"]

_TIMEOUT = 600.0
# Whatever http_proxy says: a proxy elsewhere knows no loopback address of ours. Making it takes half as long as asking.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineGoneError(ServiceError):
    """An engine could not be reached, or its connection broke: it has died, or hangs."""


class RefusedError(ServiceError):
    """An engine answered with an HTTP error."""

    status: int = 0


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> Any:
    """POST `body`, or GET without one, and return the decoded reply.

    Raises:
        EngineGoneError: no answer.
        RefusedError: an HTTP error, with its `status`.
        ServiceError: the answer is not JSON.
    """
    answer = tell(endpoint, path, body)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ServiceError(f"engine {endpoint.url} answered {path} with {answer[:200]!r}, not JSON") from error


def tell(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> bytes:
    """Do as `ask` does, for endpoints whose answer says nothing beyond its status: SGLang's is not always JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, data=data, headers={"Content-Type": "application/json"})
    if endpoint.key:
        # Not for whoever an answer may redirect to.
        request.add_unredirected_header("Authorization", f"Bearer {endpoint.key}")
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        refused = RefusedError(f"engine {endpoint.url} refused {path}: {error.code} {error.read()[:500]!r}")
        refused.status = error.code
        raise refused from error
    except (OSError, HTTPException) as error:
        raise EngineGoneError(f"engine {endpoint.url} did not answer {path}: {error}") from error
