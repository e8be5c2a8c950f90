"""Update sessions of engines: what is sent within one is put in place at its end.

An engine that stages weights puts nothing in place before that, so requests go on while it gets them. Any other writes
over the weights that it serves, and is paused for the whole of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import ServiceError
from miles_train.weight_sync.engine import RefusedError, ask

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["begin", "end", "stages"]

_NOT_FOUND, _BAD_REQUEST = 404, 400


def stages(endpoint: Endpoint) -> bool:
    """Return whether an engine leaves the weights that it serves alone until the end of a session."""
    try:
        info = ask(endpoint, "/server_info")
    except RefusedError:
        return False
    return isinstance(info, dict) and info.get("stages_weights") is True


def begin(endpoint: Endpoint) -> None:
    """Open a session, where engines have them; one that a killed run left open is closed first."""
    for _ in range(2):
        try:
            ask(endpoint, "/begin_weight_update", {})
        except RefusedError as error:
            if error.status == _NOT_FOUND:
                return
            if error.status != _BAD_REQUEST or "already open" not in str(error):
                raise
            # What it holds may be half of an update, which nobody is to be answered with.
            ask(endpoint, "/pause_generation", {"mode": "in_place"})
            end(endpoint)
        else:
            return
    raise ServiceError(f"engine {endpoint.url} does not open a weight-update session")


def end(endpoint: Endpoint) -> None:
    """Close the session, where engines have them: from now on it serves what it got."""
    try:
        ask(endpoint, "/end_weight_update", {})
    except RefusedError as error:
        if error.status != _NOT_FOUND:
            raise
