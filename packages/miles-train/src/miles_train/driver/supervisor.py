"""Engines and router may die at any moment of a run: whoever does is replaced, until the budget is spent."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from miles_api.errors import MilesError, ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from miles_api.services import Endpoint, EngineFleet, RouterService

__all__ = ["Supervisor", "Weights"]

_POLL = 0.2
"""Seconds between two looks at what runs; looking asks the operating system, no service."""
_PAUSE = 1.0
"""Seconds between two attempts to replace the same thing: a port may be taken for a moment only."""
_GRACE = 2.0
"""Seconds in which a process whose connections broke turns out to be dead: they close before it is."""
_ROUTER = "the router"


class Weights(Protocol):
    """What the supervisor needs of a weight synchronisation, which goes on at the same time in the main thread."""

    def replace(self, old: Endpoint, new: Endpoint) -> None:
        """Push to `new` in the place of `old` from now on."""
        ...

    def bring(self, endpoint: Endpoint) -> None:
        """Give a new engine the weights that are current; raises `ServiceError`."""
        ...

    def awaiting(self) -> int:
        """Return how many new engines, in `bring`, wait for the next push."""
        ...

    def give_up(self, error: MilesError) -> None:
        """Let a push that waits for a new engine raise `error`."""
        ...


class Supervisor:
    """Watches the engines and the router of a run from a thread of its own, from `start` to `stop`.

    A dead engine is taken off the router, started anew, given the current weights and registered again; a dead router
    is started anew at its address and told of the engines that serve. Each may be replaced `max_restarts` times in a
    run. What cannot be replaced is a `problem`, for the main thread to raise.
    """

    def __init__(
        self,
        fleet: EngineFleet,
        router: RouterService,
        endpoints: list[Endpoint],
        weights: Weights,
        *,
        max_restarts: int,
        note: Callable[[str], None],
    ) -> None:
        """`endpoints` are those of `fleet`, in its order, registered at `router`; `note` gets a line for each event."""
        self._fleet, self._router, self._weights = fleet, router, weights
        self._max_restarts, self._note = max_restarts, note
        self._endpoints = list(endpoints)
        # Held for each call to the router, so that it knows the engines that are in `_serving`, whoever is replaced.
        self._lock = threading.Lock()
        self._serving = dict(enumerate(endpoints))
        self._down: set[int] = set()
        self._version = ""  # of the weights that the router requires; empty before the first push
        self._replacing: set[int] = set()
        self._restarts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._problem: MilesError | None = None
        self._stopping = threading.Event()
        # Who starts an engine needs its memory: nobody does while it is held.
        self._memory = threading.Condition()
        self._held, self._starting = False, 0
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        # A slow start of one engine must not delay the replacement of another, or of the router.
        self._pool = ThreadPoolExecutor(max(len(endpoints), 1), thread_name_prefix="replace-engine")

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def problem(self) -> MilesError | None:
        """Return why no rollout can be made; None while one can. Made to be asked again and again in a long wait."""
        if self._problem is None and not self._serving and self._weights.awaiting() == len(self._endpoints):
            # With rollouts made ahead, the trainer trains while engines generate: what was sent is gone then.
            return ServiceError(
                f"every engine died while a rollout was made with the weights {self._version!r}, which nobody has any "
                "more: the trainer has gone on. Start again with --resume; --update-weight-transfer-mode disk keeps "
                "the weights of the last push for engines that start anew"
            )
        return self._problem

    def require_weights(self, version: str) -> None:
        """Let only engines that serve the weights of a push get requests, now that it is over.

        A router that replaces a dead one is told too. Raises `ServiceError`.
        """
        with self._lock:
            self._version = version
            self._tell(lambda: self._router.require_weights(version))

    def serving(self) -> list[Endpoint]:
        """Return the engines that run, registered or not yet; those that died and are noticed do not."""
        with self._lock:
            return [endpoint for index, endpoint in enumerate(self._endpoints) if index not in self._down]

    def hold(self) -> None:
        """Start no engine until `let_go`, as its memory is someone else's; return when those that start now run.

        Raises what made the run fail meanwhile.
        """
        with self._memory:
            self._held = True
            # One that waits for the next push is ready for whatever comes before that.
            while self._starting > self._weights.awaiting():
                if self._problem is not None:
                    raise self._problem
                self._memory.wait(_POLL)

    def let_go(self) -> None:
        """Replace dead engines again."""
        with self._memory:
            self._held = False
            self._memory.notify_all()

    @contextmanager
    def _start_of_an_engine(self) -> Iterator[None]:
        """Wait until the memory is there, and keep it until the engine is ready."""
        with self._memory:
            while self._held and not self._stopping.is_set():
                self._memory.wait(_POLL)
            self._starting += 1
        try:
            yield
        finally:
            with self._memory:
                self._starting -= 1
                self._memory.notify_all()

    def restarts(self) -> dict[str, float]:
        """Count the replacements since the last call: `engines/restarts` and `router/restarts`, where there are any."""
        counts: Counter[str] = Counter()
        for name, count in self._restarts.copy().items():
            counts["router/restarts" if name == _ROUTER else "engines/restarts"] += count
        news, self._told = counts - self._told, counts
        return {name: float(count) for name, count in news.items()}

    def router_report(self) -> list[dict[str, Any]]:
        """Ask the router for its hooks, if need be when it has been replaced. Raises `ServiceError`."""
        while True:
            with self._lock:
                try:
                    return self._router.report()
                except ServiceError:
                    if not self._soon(self._router.dead):
                        raise
            if self._problem is not None:
                raise self._problem
            self._stopping.wait(_POLL)

    def stop(self) -> None:
        """Replace nothing any more, and stop engines and router: nothing is started after this returns."""
        self._stopping.set()
        # A start that goes on fails when its service is stopped.
        self._fleet.stop()
        self._router.stop()
        # A new engine may wait for a push that never comes.
        self._weights.give_up(ServiceError("the run stops"))
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown()

    def _watch(self) -> None:
        while not (self._stopping.wait(_POLL) or self._problem):
            self._guarded(self._look)

    def _guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step of a thread that nobody waits for: what it raises becomes the problem."""
        try:
            step(*arguments)
        except MilesError as error:
            self._fail(error)
        except Exception:
            self._fail(ServiceError(f"a dead service could not be replaced:\n{traceback.format_exc()}"))

    def _fail(self, error: MilesError) -> None:
        if self._stopping.is_set():
            return
        self._problem = self._problem or error
        self._weights.give_up(self._problem)

    def _look(self) -> None:
        if why := self._router.dead():
            self._note(why)
            self._replace_router(why)
        busy = set(self._replacing)  # before the question: what is replaced meanwhile must not be replaced again
        for index, why in self._fleet.dead().items():
            if index not in busy:
                self._replacing.add(index)
                self._pool.submit(self._guarded, self._replace_engine, index, why)

    def _replace_router(self, why: str) -> None:
        started = time.monotonic()
        while self._may_restart(_ROUTER, why):
            try:
                with self._lock:
                    self._router.restart()
                    if self._version:
                        self._router.require_weights(self._version)
                    for endpoint in self._serving.values():
                        self._router.register(self._with_weights(endpoint))
            except ServiceError as error:
                why = str(error)
            else:
                self._note(f"{_ROUTER} is back after {time.monotonic() - started:.1f} s")
                return

    def _replace_engine(self, index: int, why: str) -> None:
        name, started = f"engine {index}", time.monotonic()
        self._take_off(index)
        while self._may_restart(name, why):
            with self._start_of_an_engine():
                try:
                    new = self._fleet.restart(index)
                    self._weights.replace(self._endpoints[index], new)
                    with self._lock:
                        self._endpoints[index] = new
                        self._down.discard(index)
                    self._weights.bring(new)
                except ServiceError as error:
                    # One that lives and does not get ready, or does not take the weights, is no case for another try.
                    if not self._soon(lambda: index in self._fleet.dead()):
                        raise
                    why = str(error)
                    with self._lock:
                        self._down.add(index)
                else:
                    self._put_on(index, new)
                    self._replacing.discard(index)
                    self._note(f"{name} is back after {time.monotonic() - started:.1f} s, at {new.url}")
                    return

    def _may_restart(self, name: str, why: str) -> bool:
        """Spend one restart; False once the run stops. Raises `ServiceError` when there is none left."""
        if self._stopping.wait(_PAUSE if self._restarts[name] else 0.0):
            return False
        if self._restarts[name] >= self._max_restarts:
            raise ServiceError(
                f"{name} is lost: --engine-max-restarts {self._max_restarts} allows no further restart. "
                f"What happened last:\n{why}"
            )
        self._restarts[name] += 1
        self._note(f"{name} is replaced, restart {self._restarts[name]} of {self._max_restarts}")
        return True

    def _take_off(self, index: int) -> None:
        with self._lock:
            self._down.add(index)
            endpoint = self._serving.pop(index)
            self._tell(lambda: self._router.unregister(endpoint))

    def _put_on(self, index: int, endpoint: Endpoint) -> None:
        with self._lock:
            self._serving[index] = endpoint
            self._tell(lambda: self._router.register(self._with_weights(endpoint)))

    def _with_weights(self, endpoint: Endpoint) -> Endpoint:
        # It has proved them; a push that it took since, and that is not over yet, is told of when it is.
        return msgspec.structs.replace(endpoint, weight_version=self._version)

    def _tell(self, call: Callable[[], None]) -> None:
        """Tell the router, unless it is dead: the next one learns of all engines that serve, and of their weights."""
        try:
            call()
        except ServiceError:
            if not self._soon(self._router.dead):
                raise

    def _soon(self, died: Callable[[], Any]) -> bool:
        """Wait a moment for `died()` to hold; say whether it does."""
        deadline = time.monotonic() + _GRACE
        while not (result := bool(died())) and time.monotonic() < deadline:
            if self._stopping.wait(_POLL / 4):
                break
        return result
