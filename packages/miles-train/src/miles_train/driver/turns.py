"""Who has the memory: engines while they generate, the trainer while it trains."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from miles_api.errors import ServiceError
from miles_train.weight_sync.engine import EngineGoneError, RefusedError, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from miles_api.services import Endpoint
    from miles_train.driver.remote import Remote
    from miles_train.driver.supervisor import Supervisor

__all__ = ["ALL_TAGS", "EngineMemory", "Turns"]

_WEIGHTS, _KV_CACHE = ALL_TAGS = ("weights", "kv_cache")
_IDLE_WITHIN = 60.0
"""Seconds in which an engine that nobody waits for ends what it still computes."""
_POLL = 0.05


class EngineMemory:
    """What each engine has given up. One that comes in the place of another has everything, also at its address."""

    def __init__(self) -> None:
        self._released: dict[int, tuple[Endpoint, set[str]]] = {}

    def release(self, endpoints: Iterable[Endpoint], *tags: str) -> None:
        """Let engines free the memory of these tags, as far as they have it; raises `ServiceError` if one refuses."""
        for endpoint in endpoints:
            released = self._released_by(endpoint)
            if held := [tag for tag in tags if tag not in released]:
                # Whoever watches an engine that does not answer finds it dead.
                with suppress(EngineGoneError):
                    _end_requests(endpoint)
                    tell(endpoint, "/release_memory_occupation", {"tags": held})
                    released.update(held)

    def resume(self, endpoints: Iterable[Endpoint], *tags: str) -> None:
        """Let engines take back what they have given up of these tags; weights are to be pushed then."""
        for endpoint in endpoints:
            released = self._released_by(endpoint)
            # SGLang dies of a tag that it had not released.
            if back := [tag for tag in tags if tag in released]:
                with suppress(EngineGoneError):
                    tell(endpoint, "/resume_memory_occupation", {"tags": back})
                    released.difference_update(back)

    def _released_by(self, endpoint: Endpoint) -> set[str]:
        return self._released.setdefault(id(endpoint), (endpoint, set()))[1]


class Turns:
    """The schedule of one machine's memory, or of one set of GPUs that trainer and engines share.

    It begins with the trainer's turn: engines have released theirs before the trainer was started. All methods are for
    the run's main thread, and do nothing where neither side gives way.
    """

    def __init__(
        self,
        trainers: Remote | None,
        supervisor: Supervisor | None,
        memory: EngineMemory,
        *,
        trainer_gives_way: bool,
        engines_give_way: bool,
    ) -> None:
        """`memory` says what engines have released before; without `supervisor` no engine runs."""
        both = trainers is not None and supervisor is not None
        self._trainers = trainers if both and trainer_gives_way else None
        self._supervisor = supervisor if both and engines_give_way else None
        self._memory = memory
        self._spent: dict[str, float] = {}
        # An engine may have been replaced since the start.
        self._release(*ALL_TAGS)

    def to_trainer(self) -> None:
        """Give the memory to the trainer, before it trains; no engine starts until `to_engines`."""
        self._release(*ALL_TAGS)
        self._onload()

    def to_engines(self, push: Callable[[], None]) -> None:
        """Give the memory to the engines, with new weights: `push` needs those of trainer and engines at once."""
        self._offload(keep_weights=True)
        self._resume(*ALL_TAGS)
        push()
        self._offload(keep_weights=False)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Give the trainer back what it needs to save, in the engines' turn; they keep their weights."""
        self._release(_KV_CACHE)
        self._onload()
        yield
        self._offload(keep_weights=False)
        self._resume(_KV_CACHE)

    def spent(self) -> dict[str, float]:
        """Return what changing turns has cost since the last call, as metrics; empty where nothing changes hands.

        They are `memory/engines_seconds`, `memory/trainer_seconds` and `memory/trainer_bytes`, what the ranks lent.
        """
        spent, self._spent = self._spent, {}
        return {f"memory/{name}": value for name, value in spent.items()}

    def _release(self, *tags: str) -> None:
        if self._supervisor:
            with self._timed("engines"):
                self._supervisor.hold()
                self._memory.release(self._supervisor.serving(), *tags)

    def _resume(self, *tags: str) -> None:
        if self._supervisor:
            with self._timed("engines"):
                self._memory.resume(self._supervisor.serving(), *tags)
                self._supervisor.let_go()

    def _onload(self) -> None:
        if self._trainers:
            with self._timed("trainer"):
                self._trainers.call("onload")

    def _offload(self, *, keep_weights: bool) -> None:
        if self._trainers:
            with self._timed("trainer"):
                moved = self._trainers.call("offload", keep_weights)
            self._add("trainer_bytes", sum(rank["bytes"] for rank in moved))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._add(f"{name}_seconds", time.perf_counter() - started)

    def _add(self, name: str, value: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + value


def _end_requests(endpoint: Endpoint) -> None:
    """Abort what nobody waits for any more, and wait until the engine is idle: SGLang dies of a release before."""
    tell(endpoint, "/abort_request", {"abort_all": True})
    deadline = time.monotonic() + _IDLE_WITHIN
    while True:
        try:
            tell(endpoint, "/flush_cache", {})
        except RefusedError as error:
            if time.monotonic() > deadline:
                raise ServiceError(f"{error}: it must be idle to release its memory (--offload-rollout)") from error
            time.sleep(_POLL)
        else:
            return
