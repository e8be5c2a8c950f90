"""Update sessions of engines: what is sent within one is put in place at its end.

An engine that stages weights puts nothing in place before that, so requests go on while it gets them. Any other writes
over the weights that it serves, and is paused for the whole of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_train.weight_sync.engine import EngineGoneError, RefusedError, ask

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["begin", "end", "stages", "within"]

_BEGIN = "/begin_weight_update"
_NOT_FOUND, _BAD_REQUEST = 404, 400
_OPEN = "already open"
_NONE = ("no weight-update session is open", "between begin_weight_update()")


def stages(endpoint: Endpoint) -> bool:
    """Return whether an engine leaves the weights that it serves alone until the end of a session."""
    try:
        info = ask(endpoint, "/server_info")
    except RefusedError:
        return False
    return isinstance(info, dict) and info.get("stages_weights") is True


def begin(endpoint: Endpoint) -> None:
    """Open a session, where engines have them, in the place of one that a killed run left open.

    What that holds may be half of an update: an engine that stages weights drops it, any other is paused.
    """
    try:
        ask(endpoint, _BEGIN, {})
    except RefusedError as error:
        if error.status == _NOT_FOUND:
            return
        if error.status != _BAD_REQUEST or _OPEN not in str(error):
            raise
        if stages(endpoint):
            ask(endpoint, _BEGIN, {"anew": True})
        else:
            end(endpoint)
            ask(endpoint, _BEGIN, {})


def within(endpoint: Endpoint, path: str, body: dict[str, Any]) -> Any:
    """Ask within a session, as `ask` does; `EngineGoneError` if there is none: another engine is at this address."""
    try:
        return ask(endpoint, path, body)
    except RefusedError as error:
        if error.status == _BAD_REQUEST and any(text in str(error) for text in _NONE):
            raise EngineGoneError(f"{error}: it was started anew during the update") from error
        raise


def end(endpoint: Endpoint) -> None:
    """Close the session, where engines have them: from now on it serves what it got."""
    try:
        within(endpoint, "/end_weight_update", {})
    except RefusedError as error:
        if error.status != _NOT_FOUND:
            raise
