"""One request's way: who may get it, who failed it, and why nobody can serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ConnectError, HungError, LostError, SilentError, UpstreamError
from .messages import CHOSEN, PREFERRED
from .policies import RouteRequest

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .messages import Scope
    from .workers import Worker, WorkerRegistry

__all__ = ["WEIGHT_VERSION", "Refusal", "Route"]

WEIGHT_VERSION = b"x-miles-weight-version"
"""The request header that names the weights an engine has to have been registered with."""
_MAX_LOST = 2
_BLAME: dict[type[UpstreamError], tuple[int, str]] = {
    ConnectError: (503, "worker_unreachable"),
    LostError: (502, "worker_lost"),
    SilentError: (504, "worker_timeout"),
    HungError: (504, "worker_hung"),
}


class Refusal(Exception):  # noqa: N818
    """No engine serves this request: the status and reason that the client gets."""

    def __init__(self, status: int, kind: str, message: str, *, retry_after: int = 1, **detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        """Seconds after which it may be worth to ask again."""
        self.detail: dict[str, object] = {"message": message, "type": kind, **detail, "code": status}


class Route:
    """What decides where one request goes, and how that went so far."""

    __slots__ = ("_chosen", "_preferred", "_version", "failed", "request")

    def __init__(self, scope: Scope, body: bytes) -> None:
        self.request = RouteRequest(scope["headers"], body)
        self.failed: dict[Worker, UpstreamError] = {}
        self._preferred: str | None = scope.get(PREFERRED)
        self._chosen: frozenset[str] | None = scope.get(CHOSEN)
        self._version = self.request.header(WEIGHT_VERSION)

    @property
    def claim(self) -> Hashable:
        """What decides who may get the request: equal for those with the same candidates."""
        return self._version, self._chosen, self._preferred, frozenset(self.failed)

    def candidates(self, registry: WorkerRegistry) -> list[Worker]:
        """Return who may get the request now; nobody once it has cost too much."""
        workers = registry.healthy
        if self.failed:
            errors = [type(error) for error in self.failed.values()]
            if SilentError in errors or errors.count(LostError) + errors.count(HungError) >= _MAX_LOST:
                return []
            workers = [worker for worker in workers if worker not in self.failed]
        if self._version is not None:
            version = self._version.decode("latin-1")
            workers = [worker for worker in workers if worker.weight_version == version]
        if self._chosen is not None:
            workers = [worker for worker in workers if worker.url in self._chosen]
        if self._preferred is not None:
            workers = [worker for worker in workers if worker.url == self._preferred] or workers
        return workers

    def refusal(self, registry: WorkerRegistry) -> Refusal:
        """Say why there is no candidate (left)."""
        if self.failed:
            worker, error = next(reversed(self.failed.items()))
            status, kind = _BLAME[type(error)]
            return Refusal(status, kind, f"worker {worker.url} {error}", worker=worker.url)
        if not len(registry):
            return Refusal(503, "no_worker", "no worker is registered")
        if not registry.healthy:
            reasons = "; ".join(f"{worker.url} {worker.reason}" for worker in registry)
            return Refusal(503, "no_worker", f"no healthy worker: {reasons}")
        if self._chosen is not None:
            chosen = ", ".join(sorted(self._chosen))
            return Refusal(503, "no_worker", f"none of the workers that middleware chose is healthy: {chosen}")
        version = (self._version or b"").decode("latin-1")
        served = ", ".join(f"{worker.url} {worker.weight_version or '(any)'}" for worker in registry.healthy)
        return Refusal(503, "no_version", f"no healthy worker is registered with weights {version}: {served}")
