"""What a request on the short way (`express`) shares with others, and what it is given and gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from .connection import UpstreamConnection
    from .errors import UpstreamError
    from .exchanges import Exchanges
    from .known_heads import KnownAnswers, KnownRequests
    from .memory import BodyMemory
    from .metrics import Metrics
    from .policies import Policy
    from .workers import Worker, WorkerRegistry

__all__ = ["HANDED", "Client", "Flow", "Handed", "Lane", "Sink"]

HANDED = "miles.handed"
"""Where a request's scope says what became of it before it was sent back to its parser."""


class Lane(NamedTuple):
    """What all requests on the short way share."""

    registry: WorkerRegistry
    policy: Policy
    looks: bool
    """Whether the policy looks at requests."""
    metrics: Metrics
    exchanges: Exchanges
    requests: KnownRequests
    answers: KnownAnswers
    bodies: BodyMemory
    max_body: int


class Handed:
    """What became of a request before `Proxy` gets it."""

    __slots__ = ("failed", "started", "worker")

    def __init__(self, started: float, worker: Worker | None, failed: dict[Worker, UpstreamError]) -> None:
        self.started = started
        self.worker = worker
        """The engine that has to get it, on a new connection; the request is counted among its outstanding ones."""
        self.failed = failed

    def take(self) -> Worker | None:
        """Return that engine, once; the caller counts the request out."""
        worker, self.worker = self.worker, None
        return worker

    def drop(self) -> None:
        """Count out a request that nobody took."""
        if (worker := self.take()) is not None:
            worker.outstanding -= 1


class Flow(Protocol):
    """Whether the client's socket takes more, and gives more."""

    @property
    def write_paused(self) -> bool: ...

    def pause_reading(self) -> None: ...


class Client(Protocol):
    """The client's connection, to `Express`."""

    transport: asyncio.Transport

    @property
    def flow(self) -> Flow: ...

    def answered(self, behind: Sequence[bytes]) -> None:
        """Go on with what came behind a request that has its answer."""

    def parse(self, pieces: Sequence[bytes], handed: Handed | None) -> None:
        """Take a request the long way, and what came behind it."""


class Sink(Protocol):
    """Who is called with an answer as it arrives, in place of a task that waits for it."""

    def pass_on(self, data: bytes, *, last: bool) -> None:
        """Take bytes that the client may get as they are, the head first."""

    def parsed(self, connection: UpstreamConnection) -> None:
        """Take what the parser has found: status, headers and `take_chunks`."""

    def failed(self, error: UpstreamError) -> None:
        """Take note that there is no (further) answer."""
