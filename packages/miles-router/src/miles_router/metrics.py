"""What the router counts, as Prometheus reads it (text format 0.0.4) and as its page does.

Counting a request is two dict or list updates: below a microsecond.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .workers import WorkerRegistry

__all__ = ["BOUNDS", "Metrics", "describe", "exposition"]

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
"""Upper bounds, in seconds, of the latency buckets; one more holds the rest."""


class Metrics:
    """Counters since the start."""

    def __init__(self) -> None:
        self.started = time.time()
        self.statuses: dict[int, int] = {}
        """Forwarded requests by the status that the client got; 499 is one who left before."""
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def observe(self, status: int, seconds: float) -> None:
        """Count one request that took `seconds` from its last byte in to its last byte out."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


def describe(metrics: Metrics, registry: WorkerRegistry, queued: int) -> dict[str, Any]:
    """Return the value of `GET /status`; its buckets are not cumulative."""
    return {
        "started": metrics.started,
        "now": time.time(),
        "statuses": {str(status): count for status, count in sorted(metrics.statuses.items())},
        "latency": {"bounds": BOUNDS, "buckets": metrics.buckets, "seconds": metrics.seconds},
        "queued": queued,
        "weight_version": registry.required,
        "workers": [worker.describe() for worker in registry],
    }


def exposition(metrics: Metrics, registry: WorkerRegistry, queued: int) -> str:
    """Return the text of `GET /metrics`."""
    return "\n".join((*_of_requests(metrics, queued), *_of_workers(registry))) + "\n"


def _of_requests(metrics: Metrics, queued: int) -> Iterator[str]:
    yield from _head("requests_total", "counter", "Forwarded requests by the status that the client got.")
    for status, count in sorted(metrics.statuses.items()):
        yield f'miles_router_requests_total{{status="{status}"}} {count}'
    yield from _head("queued_requests", "gauge", "Requests that wait for an engine below its limit.")
    yield f"miles_router_queued_requests {queued}"
    yield from _head("request_seconds", "histogram", "Seconds from a request's last byte to its answer's last byte.")
    counts = list(accumulate(metrics.buckets))
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
        yield f'miles_router_request_seconds_bucket{{le="{bound}"}} {count}'
    yield f"miles_router_request_seconds_sum {metrics.seconds}"
    yield f"miles_router_request_seconds_count {counts[-1]}"


def _of_workers(registry: WorkerRegistry) -> Iterator[str]:
    workers = list(registry)
    for name, kind, text, field in (
        ("worker_healthy", "gauge", "1 for an engine that may get requests, 0 in quarantine.", "healthy"),
        (
            "worker_outstanding_requests",
            "gauge",
            "Requests sent to an engine that are not answered yet.",
            "outstanding",
        ),
        ("worker_requests_total", "counter", "Requests sent to an engine, retries included.", "sent"),
        ("worker_failures_total", "counter", "Requests that an engine did not answer, or not to the end.", "failed"),
        ("worker_quarantines_total", "counter", "Times that an engine was quarantined.", "quarantines"),
    ):
        yield from _head(name, kind, text)
        for worker in workers:
            yield f'miles_router_{name}{{worker="{worker.url}"}} {int(getattr(worker, field))}'
    yield from _head("worker_info", "gauge", "1; the weights that an engine is registered with.")
    for worker in workers:
        labels = f'worker="{worker.url}",weight_version="{_escaped(worker.weight_version)}"'
        yield f"miles_router_worker_info{{{labels}}} 1"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP miles_router_{name} {text}", f"# TYPE miles_router_{name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
