"""Requests of one client, ended at all engines: whoever sent them does not know which engine has which."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import ConfigError

from .errors import UpstreamError
from .fetch import fetch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .workers import Worker

__all__ = ["abort"]

_PATH = "/abort_request"
_SHORTEST = 16
"""Characters of a rid: SGLang ends all requests whose ids begin with it, and a few would begin many."""
_DEADLINE_S = 5.0
_OK = 200


class _Abort(msgspec.Struct):
    """The body of SGLang's `POST /abort_request`, as far as it names what to end."""

    rid: str = ""
    abort_all: bool = False


async def abort(workers: Sequence[Worker], body: bytes) -> tuple[int, object]:
    """Tell every engine to end the requests with this `rid`, quarantined ones included; return status and answer.

    The answer names the engines that did not do it. Raises `ConfigError` for a body that would end everybody's.
    """
    wanted = msgspec.json.decode(body, type=_Abort)
    if len(wanted.rid) < _SHORTEST or wanted.abort_all:
        raise ConfigError(
            f"{_PATH}: give the rid of your requests, or how their rids begin, of at least {_SHORTEST} characters; "
            "those of others go through the same engines"
        )
    said = await asyncio.gather(*(_tell(worker, msgspec.json.encode({"rid": wanted.rid})) for worker in workers))
    failed = [{"url": worker.url, "reason": reason} for worker, reason in zip(workers, said, strict=True) if reason]
    return _OK, {"success": not failed, "failed": failed}


async def _tell(worker: Worker, body: bytes) -> str:
    """Return what went wrong; empty if nothing did."""
    try:
        async with asyncio.timeout(_DEADLINE_S):
            status, _ = await fetch(worker, _PATH, body=body)
    except TimeoutError:
        return f"does not answer within {_DEADLINE_S:g} s"
    except UpstreamError as error:
        return str(error)
    return "" if status == _OK else f"answers with {status}"
