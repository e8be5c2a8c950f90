"""Who may ask the router for what: the paths it forwards, the token, and no web pages.

A browser on this machine reaches loopback too, and any page may make it send requests; the `Origin` header, which no
other client sends, gives it away.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["allowed_methods", "bears", "comes_from_a_web_page", "names_this_machine"]

_GET, _POST = ("GET", "HEAD"), ("POST",)
_FORWARDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("/generate", "/encode", "/classify", "/rerank", "/tokenize", "/detokenize"), _POST),
    **dict.fromkeys(("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/health_generate"), _GET),
}
_PORT = re.compile(rb":[0-9]*$")
_V1, _V1_METHODS = "/v1/", (*_GET, *_POST)


def allowed_methods(path: str) -> tuple[str, ...]:
    """Return the methods that may be forwarded to a decoded `path`; none unless it is inference or information."""
    methods = _FORWARDED.get(path)
    if methods is not None:
        return methods
    # dot segments: what stands in front of an engine may resolve them, which would lead out of /v1/ again
    return _V1_METHODS if path.startswith(_V1) and ".." not in path else ()


def bears(headers: Iterable[tuple[bytes, bytes]], token: bytes) -> bool:
    """Tell whether the request brings `Authorization: Bearer <token>`."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token)
    return False


def comes_from_a_web_page(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether a browser sent the request on behalf of a page."""
    return any(name == b"origin" for name, _ in headers)


def names_this_machine(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether `Host` is an address or `localhost`: after DNS rebinding a browser sends the foreign name."""
    for name, value in headers:
        if name == b"host":
            host = _PORT.sub(b"", value).decode("latin-1")
            return host.lower() == "localhost" or _is_address(host.strip("[]"))
    return True


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
