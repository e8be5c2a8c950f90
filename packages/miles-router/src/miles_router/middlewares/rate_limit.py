"""Let each key send so many inference requests a second: a token bucket for each value of one header."""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated

import msgspec

from miles_api.options import Options, options_from
from miles_router.access import allowed_methods
from miles_router.messages import send_json

if TYPE_CHECKING:
    from miles_router.handle import RouterHandle
    from miles_router.messages import Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["Buckets", "RateLimit", "RateLimitOptions"]

_TOO_MANY = 429


class RateLimitOptions(Options, frozen=True, kw_only=True):
    """How many requests for inference each key may send."""

    rate_limit_per_second: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """Requests that each key may send a second in the long run."""
    rate_limit_burst: Annotated[int, msgspec.Meta(ge=1)] = 20
    """Requests that a key which was quiet may send at once."""
    rate_limit_header: Annotated[str, msgspec.Meta(min_length=1)] = "authorization"
    """The request header whose value is the key; requests without it share one."""
    rate_limit_keys: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    """Keys remembered; beyond, the one unseen for longest is forgotten, and starts with a full burst."""


class Buckets:
    """One token bucket a key, at most `keys` of them; keys are kept as hashes, so that long ones take no room."""

    def __init__(self, rate: float, burst: int, keys: int) -> None:
        self._rate, self._burst, self._keys = rate, float(burst), keys
        self._left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._left)

    def wait(self, key: bytes, now: float) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        key = hashlib.blake2b(key, digest_size=16).digest()
        left, since = self._left.get(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= 1.0
        self._left[key] = (left - 1.0 if allowed else left, now)
        self._left.move_to_end(key)
        if len(self._left) > self._keys:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._rate


class RateLimit:
    """Answers 429 with `Retry-After` to a key that asks too often. Management and information are not limited."""

    options = RateLimitOptions
    changes_tokens = False

    def __init__(self, app: App, *, router: RouterHandle) -> None:
        mine: RateLimitOptions = options_from(router.args, RateLimitOptions)
        self._app = app
        self._header = mine.rate_limit_header.lower().encode()
        self._buckets = Buckets(mine.rate_limit_per_second, mine.rate_limit_burst, mine.rate_limit_keys)
        self._refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST" or not allowed_methods(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = next((value for name, value in scope["headers"] if name == self._header), b"")
        seconds = self._buckets.wait(key, time.monotonic())
        if not seconds:
            await self._app(scope, receive, send)
            return
        self._refused += 1
        after = str(max(1, math.ceil(seconds))).encode()
        text = (
            f"more requests than --rate-limit-per-second allows to this {self._header.decode()}; wait {seconds:.1f} s"
        )
        detail = {"message": text, "type": "rate_limit", "code": _TOO_MANY}
        await send_json(send, _TOO_MANY, {"error": detail}, (b"retry-after", after))

    def counts(self) -> dict[str, int]:
        """Say how many requests were refused, and how many keys are remembered."""
        return {"refused": self._refused, "keys": len(self._buckets)}
