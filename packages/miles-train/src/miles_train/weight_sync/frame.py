"""A push of weights, whichever way they go: versions, proof, and engines that die meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import MilesError, ServiceError
from miles_train.weight_sync.engine import EngineGoneError, ask
from miles_train.weight_sync.plan import Plan, Sent
from miles_train.weight_sync.session import stages
from miles_train.weight_sync.verify import Reference, as_metrics, check_engine, default_tolerance
from miles_train.weight_sync.way import Gone, Push, ask_all, without

if TYPE_CHECKING:
    from miles_api.services import Endpoint
    from miles_train.options import WeightSyncOptions
    from miles_train.weight_sync.verify import Finding
    from miles_train.weight_sync.way import Way

__all__ = ["Source", "WeightSync"]

_PATIENCE = 600.0
"""Longer than a new engine takes to start; who replaces engines gives up earlier if they do not start."""


class Source(msgspec.Struct, frozen=True):
    """What the trainer does for a push; each call is made on all of its ranks."""

    export: Callable[[str, bool], dict[str, str]]
    """`export(directory, checksums)` writes a Hugging Face directory and returns the hashes asked for, by tensor."""
    score: Callable[[list[list[int]]], list[list[float]]]
    """Log-probs of each sequence's tokens after the first."""
    tokens: list[list[int]]
    """What is scored."""
    send: Callable[[Plan], Sent] | None = None
    """Sends the weights to engines within an update session; not needed where they go through a directory."""
    snapshot: Callable[[str, str], bool] | None = None
    """`snapshot(directory, version)` exports the weights if they are still those that `send` sent as that version."""


class WeightSync:
    """Bring the trainer's weights to every engine, each of which must say and prove that it serves them.

    None ever answers with half an update. Engines that write over the weights which they serve are paused from before
    the first weight until after the last, and one on which it fails stays paused; those that stage weights are paused
    for the moment in which they take the place of the old ones. Requests wait meanwhile, or end, as
    `--pause-generation-mode` says.

    `push` is for the run's main thread. `bring` and `replace` may be called from another one, which puts new engines in
    the place of dead ones: a push in which an engine dies waits for that.
    """

    def __init__(
        self,
        way: Way,
        source: Source,
        endpoints: list[Endpoint],
        options: WeightSyncOptions,
        *,
        patience: float = _PATIENCE,
    ) -> None:
        """A push waits `patience` seconds for new engines, 0 where none will come."""
        self._way = way
        self._source = source
        self._endpoints = list(endpoints)
        self._options = options
        self._patience = patience
        self._pool = ThreadPoolExecutor(max(len(endpoints), 1), thread_name_prefix="weight-sync")
        # Held while engines load, so that none gets two pushes at once; a push that waits for a new engine lets go.
        self._changed = threading.Condition()
        self._current: Push | None = None
        self._served: dict[str, tuple[Push, Finding | None]] = {}
        """By the URL of each engine, what it got last and what the check saw."""
        self._stages: dict[str, bool] = {}
        """By the URL of each engine, whether it stages weights."""
        self._given_up: MilesError | None = None
        self._awaiting: list[Endpoint] = []
        self._check_next = True

    def push(self, version: int) -> dict[str, float]:
        """Bring the trainer's current weights, the `version`-th, to every engine; return metrics of the check.

        They are empty for a push that is not checked. The first one is; which others are follows from `version` alone.

        Raises:
            ServiceError: an engine refuses the weights, serves others, or died and was not replaced in time.
        """
        with self._changed:
            interval = self._options.weight_check_interval
            push = Push(str(version), self._check_next or (interval > 0 and version % interval == 0))
            self._way.prepare(push)
            self._refer(push)
            self._current, old = push, self._current
            if old is not None:
                self._way.retire(old)
            self._check_next = False
            self._serve_all(push)
            self._changed.notify_all()
            findings = [finding for _, finding in self._served.values() if finding]
            return as_metrics(findings) if findings else {}

    def bring(self, endpoint: Endpoint) -> None:
        """Load the last pushed weights on one new engine, and verify it as far as that push was checked.

        Before the first push there is nothing to do. If the trainer has gone on and nobody else has those weights, it
        returns when the next push has given them to this engine too. Raises as `push` does, and `EngineGoneError` (a
        `ServiceError`) at once if the engine does not answer.
        """
        with self._changed:
            push = self._current
            if push is None or self._has(endpoint, push):
                return
            if not self._way.hand(endpoint, push):
                self._await_push(endpoint)
                return
            _go_on(endpoint, push)
            self._refer(push)
            self._verify(endpoint, push)
            self._changed.notify_all()

    def replace(self, old: Endpoint, new: Endpoint) -> None:
        """Push to `new` in the place of `old` from now on, and check the next push whatever the interval.

        `bring` gives it the weights of the last one.
        """
        with self._changed:
            self._check_next = True
            self._endpoints = [new if endpoint.url == old.url else endpoint for endpoint in self._endpoints]
            self._served.pop(old.url, None)
            self._changed.notify_all()

    def awaiting(self) -> int:
        """Return how many new engines, in `bring`, wait for the next push: nothing is being sent to them."""
        push = self._current
        # One that was served counts no more, although its thread may not have noticed yet.
        return sum(push is None or not self._has(endpoint, push) for endpoint in list(self._awaiting))

    def give_up(self, error: MilesError) -> None:
        """Say that dead engines will not be replaced any more: a push that waits for one raises `error`."""
        with self._changed:
            self._given_up = error
            self._changed.notify_all()

    def served(self, version: int) -> str:
        """Return how engines call the weights of that push: by the same number."""
        return str(version)

    def close(self) -> None:
        """Remove what is left of the last push."""
        self._pool.shutdown(wait=False)
        self._way.close()

    def _await_push(self, endpoint: Endpoint) -> None:
        """Wait until a push, the one under way or the next, has served this engine.

        Its death is noticed there, or by who watches it.
        """
        self._awaiting.append(endpoint)
        try:
            while self._current is None or not self._has(endpoint, self._current):
                if self._given_up is not None:
                    raise self._given_up
                if not self._lists(endpoint):
                    raise EngineGoneError(f"engine {endpoint.url} was replaced before it had weights")
                self._changed.wait()
        finally:
            self._awaiting = [one for one in self._awaiting if one is not endpoint]

    def _serve_all(self, push: Push) -> None:
        """Load on all engines, and on those that come in the place of engines that die meanwhile."""
        waiting, deadline = self._endpoints, time.monotonic() + self._patience
        while waiting:
            waiting = self._replacements(self._serve(waiting, push), push, deadline)

    def _serve(self, endpoints: list[Endpoint], push: Push) -> Gone:
        """Load on these engines and verify those that did not die; return those that did."""
        gone = self._learn(endpoints)
        push.staged = all(self._stages[one.url] for one in without(endpoints, gone))
        steps: list[Callable[[list[Endpoint]], Gone]] = [self._pause, lambda left: self._way.deliver(left, push)]
        if push.staged:
            steps.reverse()
        steps.append(lambda left: self._way.finish(left, push))
        steps.append(lambda left: ask_all(self._pool, left, lambda one: _go_on(one, push)))
        for step in steps:
            gone += step(without(endpoints, gone))
        self._refer(push)
        gone += ask_all(self._pool, without(endpoints, gone), lambda one: self._verify(one, push))
        return gone

    def _learn(self, endpoints: list[Endpoint]) -> Gone:
        """Ask engines of which nothing is known yet whether they stage weights."""

        def learn(endpoint: Endpoint) -> None:
            self._stages[endpoint.url] = stages(endpoint)

        return ask_all(self._pool, [one for one in endpoints if one.url not in self._stages], learn)

    def _pause(self, endpoints: list[Endpoint]) -> Gone:
        mode = {"mode": self._options.pause_generation_mode}
        return ask_all(self._pool, endpoints, lambda one: ask(one, "/pause_generation", mode))

    def _verify(self, endpoint: Endpoint, push: Push) -> None:
        """Note that an engine serves the weights, after it has proved it if the push is checked."""
        self._served[endpoint.url] = (push, check_engine(endpoint, push.reference) if push.reference else None)

    def _refer(self, push: Push) -> None:
        if not push.due or push.reference is not None or not push.checksums:
            return
        given = self._options.weight_check_tolerance
        push.reference = Reference(
            version=push.version,
            checksums=push.checksums,
            tokens=self._source.tokens,
            log_probs=self._source.score(self._source.tokens),
            tolerance=default_tolerance(push.dtype) if given is None else given,
        )

    def _replacements(self, gone: Gone, push: Push, deadline: float) -> list[Endpoint]:
        """Wait until no engine in `gone` is listed; return those listed now that have not been given this push yet."""
        while left_over := [error for endpoint, error in gone if self._lists(endpoint)]:
            if self._given_up is not None:
                raise self._given_up
            left = deadline - time.monotonic()
            if left <= 0:
                after = f", and nothing took its place within {self._patience:g} s" if self._patience else ""
                raise ServiceError(f"{left_over[0]}{after}") from left_over[0]
            self._changed.wait(left)
        return [endpoint for endpoint in self._endpoints if not self._has(endpoint, push)]

    def _lists(self, endpoint: Endpoint) -> bool:
        # Not by equality: with fixed ports an engine comes back at the URL of the one that it replaces.
        return any(listed is endpoint for listed in self._endpoints)

    def _has(self, endpoint: Endpoint, push: Push) -> bool:
        return endpoint.url in self._served and self._served[endpoint.url][0] is push


def _go_on(endpoint: Endpoint, push: Push) -> None:
    """Let an engine that has got all weights go on. Raises `ServiceError` if it says that it serves others."""
    served = ask(endpoint, "/model_info").get("weight_version")
    if served != push.version:
        raise ServiceError(f"engine {endpoint.url} took weights {push.version!r} but says it serves {served!r}")
    ask(endpoint, "/continue_generation", {})
