"""The registered engines: who they are, how busy, and whether they may get requests."""

from __future__ import annotations

import itertools
import logging
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from miles_api.errors import ConfigError

from .errors import ConnectError
from .pool import ConnectionPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Worker", "WorkerRegistry", "normalise_url"]

_log = logging.getLogger("miles_router")

_MAX_LOST = 3
_BAD_ANSWERS = 5
_FIRST_BAD_STATUS = 500
_NO_ADDRESS = "worker url {!r} is not of the form http://host:port"
_KEY = re.compile(r"[!-~]*")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+(%[a-z0-9._-]+)?")


def normalise_url(url: str) -> str:
    """Return `http://host:port` as workers are keyed. Raises `ConfigError` for anything else than an engine's root."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError(_NO_ADDRESS.format(url)) from None
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password
    if parts.scheme != "http" or not _HOST.fullmatch(name) or not port or extra:
        raise ConfigError(_NO_ADDRESS.format(url))
    host = f"[{name}]" if ":" in name else name
    return f"http://{host}:{port}"


class Worker:
    """One registered engine."""

    __slots__ = (
        "bad_answers",
        "failed",
        "healthy",
        "heard",
        "host",
        "hung",
        "id",
        "key",
        "key_line",
        "lost",
        "outstanding",
        "pool",
        "quarantines",
        "questioned",
        "reason",
        "sent",
        "strikes",
        "url",
        "weight_version",
    )  # fmt: skip

    def __init__(self, number: int, url: str, weight_version: str) -> None:
        parts = urlsplit(url)
        self.id = f"worker-{number}"
        self.url = url
        self.host = parts.netloc.encode()
        self.use_key("")
        self.pool = ConnectionPool(str(parts.hostname), int(parts.port or 0))
        self.outstanding = 0
        """Requests sent to it that are not answered yet."""
        self.healthy = True
        self.reason = ""
        """Why it is quarantined; empty while healthy."""
        self.weight_version = weight_version
        """The weights it was registered with or has shown since, which it has to serve when it is re-admitted; empty
        means any."""
        self.sent = 0
        """Requests sent to it so far; `failed` of them it did not answer, or not to the end."""
        self.failed = 0
        self.lost = 0
        """How many it failed since it last answered one."""
        self.bad_answers = 0
        """How many of its last answers in a row had a 5xx status."""
        self.quarantines = 0
        self.strikes = 0
        """How often it was quarantined since it last answered well: the more often, the later it is probed."""
        self.questioned = False
        """Whether a probe asks it how it is."""
        self.heard = 0.0
        """When a generation that is over sent something last, on the clock of the event loop."""
        self.hung = False
        """Whether it was found to hang and was not re-admitted since."""

    def use_key(self, key: str) -> None:
        """Show this key with every request from now on; none if it is empty."""
        self.key = key.encode()
        self.key_line = b"authorization: Bearer %b\r\n" % self.key if key else b""
        """The header line."""

    def describe(self) -> dict[str, object]:
        """Return the row of `GET /workers`."""
        return {
            "id": self.id,
            "url": self.url,
            "healthy": self.healthy,
            "outstanding": self.outstanding,
            "weight_version": self.weight_version,
            "reason": self.reason,
            "sent": self.sent,
            "failed": self.failed,
            "quarantines": self.quarantines,
        }


class WorkerRegistry:
    """All workers, in order of registration, and how they fare.

    `on_quarantine` is called once each time one turns unhealthy, `on_doubt` when one that is healthy should be asked.
    """

    def __init__(self, on_quarantine: Callable[[Worker], None], on_doubt: Callable[[Worker], None]) -> None:
        self._on_quarantine = on_quarantine
        self._on_doubt = on_doubt
        self.on_change: Callable[[], None] | None = None
        """Called when `healthy` changed, or the weights of one in it."""
        self._numbers = itertools.count()
        self._by_url: dict[str, Worker] = {}
        self.healthy: list[Worker] = []
        """The workers that may get requests; replaced, never changed in place."""
        self.urls: frozenset[str] = frozenset()
        """All workers, replaced when one comes or goes."""
        self.required = ""
        """The weights that every worker has to serve to get requests; empty means that each has its own version."""

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_url.values())

    def __len__(self) -> int:
        return len(self._by_url)

    def __contains__(self, worker: Worker) -> bool:
        return self._by_url.get(worker.url) is worker

    @property
    def any_key(self) -> bool:
        """Whether any worker asks for a key."""
        return any(worker.key for worker in self)

    def add(self, url: str, weight_version: str = "", key: str = "") -> Worker:
        """Register an engine, or take the word of the caller that a known one is healthy and has these weights.

        Where other weights are required, nobody's word is taken: it is quarantined until it shows those. `key` is sent
        to this engine alone; a known one keeps the one it has where none is given. Raises `ConfigError`.
        """
        url = normalise_url(url)
        if not _KEY.fullmatch(key):
            raise ConfigError(f"the key of {url} has characters that no header may hold")
        worker = self._by_url.get(url)
        if worker is not None and key:
            worker.use_key(key)
        if worker is None:
            worker = self._by_url[url] = Worker(next(self._numbers), url, weight_version)
            worker.use_key(key)
            self.urls = frozenset(self._by_url)
            if self.required in ("", weight_version):
                self._refresh()
            else:
                self._doubt_weights(worker)
        elif self.required in ("", weight_version):
            changed, worker.weight_version = worker.weight_version != weight_version, weight_version
            if worker.healthy and changed:
                self.changed()
            self.readmit(worker)
        elif weight_version:
            self._doubt_weights(worker)
        return worker

    def weights_of(self, worker: Worker) -> str:
        """Return the weights that a worker has to show before it is re-admitted; empty means any."""
        return self.required or worker.weight_version

    def remove(self, key: str) -> Worker | None:
        """Forget the engine with this URL or id; requests under way finish. None if there is no such engine."""
        worker = next((w for w in self if key.rstrip("/") in (w.url, w.id)), None)
        if worker is not None:
            del self._by_url[worker.url]
            self.urls = frozenset(self._by_url)
            worker.pool.close()
            self._refresh()
        return worker

    def quarantine(self, worker: Worker, reason: str) -> None:
        """Send a worker no further requests until `readmit`."""
        if not worker.healthy or worker not in self:
            return
        worker.healthy = False
        worker.reason = reason
        worker.quarantines += 1
        worker.strikes += 1
        worker.pool.close_idle()
        self._refresh()
        _log.warning("worker %s %s; no requests until it is healthy again", worker.url, reason)
        self._on_quarantine(worker)

    def readmit(self, worker: Worker) -> None:
        """Let a quarantined worker get requests again."""
        if worker.healthy:
            return
        worker.healthy = True
        worker.reason = ""
        worker.hung = False
        worker.lost = worker.bad_answers = 0
        self._refresh()
        _log.warning("worker %s is healthy again", worker.url)

    def answered(self, worker: Worker, status: int) -> None:
        """Note that a worker answered a request to the end; one that only ever sends 5xx is asked how it is.

        It would draw all requests, as whoever fails fast is the least loaded.
        """
        if status >= _FIRST_BAD_STATUS:
            worker.bad_answers += 1
            if worker.bad_answers % _BAD_ANSWERS == 0:
                self._on_doubt(worker)
        elif worker.bad_answers or worker.lost or worker.strikes:
            worker.bad_answers = worker.lost = worker.strikes = 0

    def failed(self, worker: Worker, error: Exception) -> None:
        """Note that a worker did not answer a request, or not to the end; the third in a row is one too many."""
        worker.failed += 1
        worker.lost += 1
        if isinstance(error, ConnectError):
            self.quarantine(worker, str(error))
        elif worker.lost >= _MAX_LOST:
            self.quarantine(worker, f"failed {worker.lost} requests in a row, the last because it {error}")

    def changed(self) -> None:
        """Say that `healthy` or the weights of one in it are not what they were."""
        if self.on_change is not None:
            self.on_change()

    def _doubt_weights(self, worker: Worker) -> None:
        self.quarantine(worker, f"has not shown yet that it serves weights {self.required}")

    def _refresh(self) -> None:
        self.healthy = [worker for worker in self if worker.healthy]
        self.changed()
