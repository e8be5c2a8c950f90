"""A fleet of engines that are processes of this machine: started together, watched, replaced and ended."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError
from miles_rollout.engines.asking import REQUEST_TIMEOUT, request, with_version

if TYPE_CHECKING:
    from miles_api.services import Endpoint, Placement
    from miles_rollout.engines.child import Child

__all__ = ["ProcessFleet"]

_POLL = 0.05


class ProcessFleet(ABC):
    """An `EngineFleet` of processes, for one start and one stop; what they are is up to `_spawn`.

    An engine that dies by itself, once it has answered, is reported on stderr with its last words.
    """

    _health_patience = 1.0
    """Seconds that one question for health may take at start."""

    def __init__(self, start_timeout: float, health_timeout: float = 0.0) -> None:
        """Set how many seconds an engine may take to answer, and to be silent once it has; 0 is for ever."""
        self._start_timeout, self._health_timeout = start_timeout, health_timeout
        self._placements: list[Placement] = []
        self._children: list[Child] = []
        self._replaced = 0
        self._stopped = threading.Event()
        # held while an engine is added: `stop`, which may come from another thread, finds all or prevents it
        self._lock = threading.Lock()

    @abstractmethod
    def _spawn(self, index: int, *, again: bool) -> Child:
        """Start the process of `self._placements[index]`; `again` if it replaces another. Raises `ServiceError`."""

    def start(self, placements: list[Placement]) -> None:
        """Start one engine for each placement and wait until all answer.

        Raises:
            ServiceError: an engine died (with the end of its stderr) or took too long, or `stop` was called before or
                meanwhile.
        """
        if self._children:
            raise ServiceError("the engines are already started")
        self._placements = list(placements)
        try:
            children = [self._launch(index) for index in range(len(placements))]
            deadline = time.monotonic() + self._start_timeout
            for child in children:
                self._await_health(child, deadline)
            self._refuse_if_stopped()
        except BaseException:
            self._end_all()
            raise

    def endpoints(self) -> list[Endpoint]:
        """Return every engine's address with the weight version it reports; a dead engine reports none."""
        serving = [child for child in self._children if child.serves]
        return [with_version(child.endpoint) if child.process.poll() is None else child.endpoint for child in serving]

    def pause(self) -> None:
        """Stop every engine between two tokens; requests keep their place and their keys and values."""
        self._post_all("/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Let every engine go on."""
        self._post_all("/continue_generation", {})

    def restart(self, index: int) -> Endpoint:
        """Replace engine `index` and return where the new one is; it may not get requests before it has the weights.

        Raises:
            ServiceError: it does not start, or `stop` was called before or meanwhile.
        """
        with self._lock:
            self._refuse_if_stopped()
            old = self._children[index]
            self._replaced += 1
        old.end()
        child = self._launch(index, again=True)
        self._await_health(child, time.monotonic() + self._start_timeout)
        return child.endpoint

    def dead(self) -> dict[int, str]:
        """Return, for each engine that died by itself or does not react, how, and its last words; by index."""
        return {child.index: text for child in list(self._children) if (text := child.why_dead())}

    def stop(self) -> None:
        """End every engine, for good; may be called twice, before `start`, or while another thread is in it."""
        self._stopped.set()
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            children, self._children = self._children, []
        for child in children:
            child.tell_to_end()
        for child in children:
            child.end()

    def _refuse_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise ServiceError("the engines were stopped")

    def _launch(self, index: int, *, again: bool = False) -> Child:
        """Start an engine at place `index`."""
        with self._lock:
            self._refuse_if_stopped()
            child = self._spawn(index, again=again)
            self._children[index : index + 1] = [child]
        return child

    def _await_health(self, child: Child, deadline: float) -> None:
        """Wait until `child` answers, and watch it from then on; a part that answers nobody only has to run."""
        while True:
            status = child.process.poll()  # asked first: `stop` says so before it ends a child
            self._refuse_if_stopped()
            if status is not None:
                raise ServiceError(f"engine {child.index} ended with status {status} at start:\n{child.last_lines()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServiceError(
                    f"engine {child.index} did not answer within {self._start_timeout:g} s "
                    f"(--engine-start-timeout):\n{child.last_lines()}"
                )
            if not child.serves or self._answers(child, left):
                child.watch(self._health_timeout)
                return

    def _answers(self, child: Child, patience: float) -> bool:
        try:
            # Where the socket listens from the start, this waits in its queue while the model loads.
            request(child.endpoint.url + "/health", None, min(self._health_patience, patience))
        except OSError:
            self._stopped.wait(_POLL)
            return False
        return True

    def _post_all(self, path: str, body: dict[str, Any]) -> None:
        for child in [child for child in self._children if child.serves]:
            try:
                request(child.endpoint.url + path, body, REQUEST_TIMEOUT, child.endpoint.key)
            except OSError as error:
                raise ServiceError(f"engine {child.index} at {child.endpoint.url} failed {path}: {error}") from error
