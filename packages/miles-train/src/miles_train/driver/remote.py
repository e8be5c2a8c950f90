"""Calls to worker processes, each of which ends: with results, a failure, a deadline, or the end of the run."""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from miles_api.errors import MilesError, ServiceError
from miles_train.driver.stuck import how_it_crashed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from miles_api.config import RunConfig

__all__ = ["Pending", "Remote", "Watch", "told"]

_COLOUR = re.compile(r"\x1b\[\d*m")
"""Ray colours its tracebacks, whoever reads them."""
_SLICE = 0.5
"""Seconds between two looks at the rest of the run, while a call waits."""
_GRACE = 2.0
"""Seconds in which the death of a process may still be told, when another one that worked with it has failed."""


class Watch:
    """All worker processes of a run: whoever waits for one of them also hears that the run has to end."""

    def __init__(self, check: Callable[[], None], stacks_in: Path) -> None:
        """`check` raises when the run was interrupted; a process that crashes writes its stacks to `stacks_in`."""
        self._check = check
        self.stacks_in = stacks_in
        self._problems: list[tuple[Callable[[], MilesError | None], Collection[str] | None]] = []
        self._actors: dict[str, Any] = {}
        self._pings: dict[Any, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, actor: Any) -> None:
        """Look after a process from now on."""
        self._actors[name] = actor

    def heed(self, problem: Callable[[], MilesError | None], during: Collection[str] | None = None) -> None:
        """Ask `problem` in every wait from now on, or in those for the methods `during`, and raise what it returns."""
        self._problems.append((problem, during))

    def look(self, method: str | None = None) -> None:
        """Raise if the run has to end: it was interrupted, or something else that it needs now has failed."""
        self._check()
        for problem, during in self._problems:
            if (during is None or method in during) and (error := problem()) is not None:
                raise error

    def look_at_processes(self, doing: str) -> None:
        """Raise `ServiceError` if any process has died, also one that nobody waits for."""
        with self._lock:
            idle = self._actors.keys() - self._pings.values()
            # A call waits behind the one that its process is busy with, and fails as soon as the process dies.
            self._pings |= {self._actors[name].ping.remote(): name for name in idle}
            done, _ = ray.wait(list(self._pings), num_returns=len(self._pings), timeout=0)
            for name, ref in [(self._pings.pop(ref), ref) for ref in done]:
                try:
                    ray.get(ref)
                except RayError as error:
                    raise ServiceError(_death_of(name, doing, error, self.stacks_in)) from error


class Pending:
    """A call that goes on while the driver does something else."""

    def __init__(self, part: Any, wait: Callable[[], dict[str, Any]]) -> None:
        """`part` refers to what is left where it is, `wait` returns the rest."""
        self._part, self._wait = part, wait
        self._rest: dict[str, Any] | None = None

    def result(self) -> tuple[Any, dict[str, Any]]:
        """Wait for it; return the reference and the rest. Raises what the call raised; may be asked again."""
        if self._rest is None:
            self._rest = self._wait()
        return self._part, self._rest


class Remote:
    """One service in one or more worker processes: the ranks of the trainer, or the rollout process."""

    def __init__(
        self,
        service: str,
        actors: dict[str, Any],
        watch: Watch,
        *,
        deadline: tuple[str, float],
        stacks: Callable[[list[str]], str],
    ) -> None:
        """`actors` have the names that people read; `deadline` is a flag and its seconds.

        `stacks` says what the processes of the given names do when they are late.
        """
        self._service = service
        self._actors = actors
        self._watch = watch
        self._flag, self._timeout = deadline
        self._stacks = stacks
        self._late_in: str | None = None
        # Two threads may call: every process must get their calls in one order, or collectives do not match.
        self._order = threading.Lock()
        for name, actor in actors.items():
            watch.add(name, actor)

    def listen(self) -> tuple[str, int, int]:
        """Return the first process's node address, a port, and the first process's own descriptor of its listener."""
        name, actor = next(iter(self._actors.items()))
        return self._get("start", {actor.listen.remote(): name})[0]

    def gpus(self) -> list[tuple[int, ...]]:
        """Return the numbers of each process's GPUs, in rank order."""
        return self._get("start", {actor.gpus.remote(): name for name, actor in self._actors.items()})

    def build(self, config: RunConfig, keywords: list[dict[str, Any]]) -> None:
        """Create the service in every process, each with its own keywords."""
        pairs = zip(self._actors.items(), keywords, strict=True)
        self._get("start", {actor.build.remote(self._service, config, mine): name for (name, actor), mine in pairs})

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Call a method on every process and wait for all results, in rank order; `timeout` (s) replaces the usual."""
        with self._order:
            refs = {actor.call.remote(method, *args): name for name, actor in self._actors.items()}
        return self._get(method, refs, timeout)

    def call_split(self, method: str, key: str, *args: Any) -> tuple[Any, dict[str, Any]]:
        """Call on the one process; return a reference to `result[key]`, left where it is, and the rest."""
        return self.begin_split(method, key, *args).result()

    def begin_split(self, method: str, key: str, *args: Any) -> Pending:
        """Do as `call_split` does, without waiting: the deadline counts from now on."""
        ((name, actor),) = self._actors.items()
        part, rest = actor.call_split.options(num_returns=2).remote(method, key, *args)
        begun = time.monotonic()
        return Pending(part, lambda: self._get(method, {rest: name}, begun=begun)[0])

    def _get(
        self, method: str, refs: dict[Any, str], timeout: float | None = None, begun: float | None = None
    ) -> list[Any]:
        """Wait for all results within the deadline, or for the first failure of any process of the run."""
        doing = f"{self._service}.{method}"
        if self._late_in is not None:
            raise ServiceError(f"{doing} was not called: the process still hangs in {self._late_in}")
        end = (begun or time.monotonic()) + (timeout or self._timeout)
        results: dict[Any, Any] = {}
        pending = dict(refs)
        while pending:
            # A call with a deadline of its own ends soon, and is made when the run has failed already.
            if timeout is None:
                self._watch.look(method)
            left = max(0.0, end - time.monotonic())
            done, _ = ray.wait(list(pending), timeout=min(_SLICE, left))
            for ref in done:
                results[ref] = self._result(ref, pending, doing)
            if done:
                continue
            if not left:
                raise self._late(list(pending.values()), doing, timeout)
            if timeout is None:
                self._watch.look_at_processes(doing)
        return [results[ref] for ref in refs]

    def _result(self, ref: Any, pending: dict[Any, str], doing: str) -> Any:
        name = pending.pop(ref)
        try:
            return ray.get(ref)
        except RayError as error:
            if not isinstance(error, RayActorError):
                # A rank that dies fails the others' collectives: what they saw of it is not what happened.
                name, error = _death_among(pending) or (name, error)
            raise told(name, doing, error, self._watch.stacks_in) from error

    def _late(self, names: list[str], doing: str, timeout: float | None) -> ServiceError:
        if timeout is not None:
            return ServiceError(f"{doing} did not return within {timeout:g} s")
        self._late_in = doing
        return ServiceError(
            f"{doing} did not return within {self._flag} {self._timeout:g} s from {', '.join(names)}\n"
            + self._stacks(names)
        )


def _death_among(pending: dict[Any, str]) -> tuple[str, RayError] | None:
    """Return the first process that turns out to have died within the grace, and how Ray says it."""
    end = time.monotonic() + _GRACE
    pending = dict(pending)
    while pending and (left := end - time.monotonic()) > 0:
        done, _ = ray.wait(list(pending), timeout=left)
        for ref in done:
            name = pending.pop(ref)
            try:
                ray.get(ref)
            except RayActorError as error:
                return name, error
            except RayError:
                continue
    return None


def told(name: str, doing: str, error: RayError, stacks_in: Path) -> MilesError:
    """Return our own errors as they were raised, and of others what happened where."""
    if isinstance(error, RayActorError):
        return ServiceError(_death_of(name, doing, error, stacks_in))
    cause = error.cause if isinstance(error, RayTaskError) else None
    if not isinstance(cause, MilesError):
        return ServiceError(f"{doing} failed in {name}\n{_COLOUR.sub('', str(error))}")
    again = type(cause)(*cause.args)
    for note in getattr(cause, "__notes__", []):
        again.add_note(note)
    return again


def _death_of(name: str, doing: str, error: RayError, stacks_in: Path) -> str:
    """Say which process died when, and what Ray and the process itself know about it."""
    # Ray's text begins with the names it has for itself; the cause is its last line, or a whole traceback.
    text = _COLOUR.sub("", str(error)).strip()
    pid = re.search(r"^\s*pid: (\d+)$", text, re.MULTILINE)
    said = text if "Traceback" in text else text.splitlines()[-1]
    crash = how_it_crashed(stacks_in, name, pid[1]) if pid else ""
    return f"{name}{f' (pid {pid[1]})' if pid else ''} died during {doing}\n{crash or said}"
