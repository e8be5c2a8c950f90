"""The exchanges under way: which engine each waits for, how long it has said nothing, and how it is ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .errors import SilentError

if TYPE_CHECKING:
    from .connection import UpstreamConnection
    from .errors import UpstreamError
    from .workers import Worker

__all__ = ["Exchanges"]

_FIRST_REFUSAL = 400


class Exchanges:
    """Every exchange with an engine, whatever became of the engine meanwhile: quarantined, or removed."""

    def __init__(self) -> None:
        self._of: dict[UpstreamConnection, tuple[Worker, bool]] = {}

    def begin(self, connection: UpstreamConnection, worker: Worker, *, generates: bool) -> None:
        """Note an exchange; `generates` says that the engine has to work for its answer, not only to react."""
        self._of[connection] = worker, generates

    def end(self, connection: UpstreamConnection) -> None:
        """Forget an exchange that is over."""
        worker, generates = self._of.pop(connection)
        if generates and _is_generating(connection):
            worker.heard = connection.last_activity

    def silent(self, before: float) -> set[Worker]:
        """Return the workers that left a request without a byte, and generated nothing for any other, since `before`.

        A client that reads slowly is not its worker's silence.
        """
        silent = {worker for connection, (worker, _) in self._of.items() if _is_silent(connection, before)}
        return {worker for worker in silent if not self.heard(worker, before)}

    def heard(self, worker: Worker, since: float) -> bool:
        """Tell whether a worker generated something after `since`; a cheap answer does not show that it can."""
        return worker.heard > since or any(
            generates and at is worker and connection.last_activity > since and _is_generating(connection)
            for connection, (at, generates) in self._of.items()
        )

    def abandon(self, worker: Worker, error: UpstreamError) -> None:
        """End every exchange with a worker."""
        for connection, (at, _) in list(self._of.items()):
            if at is worker:
                connection.fail(error)

    async def expire_silent(self, timeout: float) -> None:
        """Fail exchanges whose engine said nothing for `timeout` seconds, for ever; one timer for all requests."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, timeout / 4))
            before = loop.time() - timeout
            for connection in list(self._of):
                if _is_silent(connection, before):
                    connection.fail(SilentError(f"sent nothing for {timeout:g} s"))


def _is_generating(connection: UpstreamConnection) -> bool:
    return connection.speaks and connection.status < _FIRST_REFUSAL


def _is_silent(connection: UpstreamConnection, before: float) -> bool:
    return connection.last_activity < before and not (connection.paused or connection.complete)
