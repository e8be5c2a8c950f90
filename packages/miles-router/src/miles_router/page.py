"""The page at `/`: one file, which loads nothing but `/status`.

It holds no secret, so everybody may have it; what it shows needs the token where there is one. A browser cannot be
told to send one, so it stands in the address behind `#`, which never leaves the browser, and the page takes it from
there.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

__all__ = ["PAGE_HEADERS", "page"]


@functools.cache
def page() -> bytes:
    """Return the HTML."""
    return resources.files("miles_router").joinpath("page.html").read_bytes()


def _policy() -> bytes:
    """Admit this page's own script and style, by hash, and nothing from elsewhere; nobody may frame it."""
    parts = {"style": b"style-src", "script": b"script-src"}
    rules = [b"default-src 'none'", b"connect-src 'self'", b"frame-ancestors 'none'", b"base-uri 'none'"]
    for tag, rule in parts.items():
        text = re.search(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page(), re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1]).digest())
        rules.append(b"%b 'sha256-%b'" % (rule, digest))
    return b"; ".join(rules)


PAGE_HEADERS = (
    (b"content-security-policy", _policy()),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
