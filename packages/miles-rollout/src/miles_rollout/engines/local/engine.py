"""The model loop: one thread that steps the scheduler, fed through an inbox and heard through one callback."""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from miles_rollout.engines.local.errors import EngineDeadError
from miles_rollout.engines.local.jobs import Job, News
from miles_rollout.engines.protocol import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_rollout.engines.local.scheduler import Scheduler

__all__ = ["Engine"]

T = TypeVar("T")

_GATHER_STEP, _GATHER_LIMIT = 0.0005, 0.004
"""Seconds: an idle engine waits while requests keep coming, so that a burst starts as one batch."""


class Engine:
    """Runs a `Scheduler` in its own thread. `submit` and `call` may be used from any other thread.

    `on_news(news)` is called in the model thread after each step that has news; it must only hand them over.
    """

    def __init__(self, scheduler: Scheduler, on_news: Callable[[News], None]) -> None:
        self.scheduler = scheduler
        self.dead: BaseException | None = None
        self.on_dead: Callable[[BaseException], object] = lambda _: None
        self._on_news = on_news
        self._inbox: list[Job] = []
        self._calls: list[tuple[Callable[[], Any], Future]] = []
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model-loop", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step; jobs under way are left unanswered."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the model loop runs."""
        return self.dead is None and self._thread.is_alive()

    @property
    def queued(self) -> int:
        """Jobs handed in and not yet seen by the scheduler."""
        return len(self._inbox)

    def submit(self, jobs: list[Job]) -> None:
        """Hand in jobs; each is heard of through `on_news`."""
        with self._wake:
            if self.dead is not None:
                raise EngineDeadError(f"the model loop has stopped: {self.dead!r}")
            self._inbox += jobs
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the model thread between two steps, after all jobs submitted so far have been queued."""
        future: Future[T] = Future()
        with self._wake:
            if self.dead is not None:
                future.set_exception(EngineDeadError(f"the model loop has stopped: {self.dead!r}"))
            else:
                self._calls.append((function, future))
                self._wake.notify()
        return future

    def tell(self, jobs: list[Job]) -> None:
        """Report jobs that ended outside a step; called in the model thread."""
        self._on_news(News(finished=jobs))

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as error:
            traceback.print_exc()
            self._die(error)

    def _turn(self) -> bool:
        scheduler = self.scheduler
        with self._wake:
            while not (self._inbox or self._calls or self._stopping or scheduler.runs):
                self._wake.wait()
            if self._stopping:
                return False
            if self._inbox and not self._calls and not scheduler.busy:
                self._gather()
            jobs, self._inbox = self._inbox, []
            calls, self._calls = self._calls, []
        for job in jobs:
            scheduler.add(job)
        for function, future in calls:
            _answer(function, future)
        news = scheduler.step()
        if news:
            self._on_news(news)
        return True

    def _gather(self) -> None:
        deadline = time.monotonic() + _GATHER_LIMIT
        seen = 0
        while len(self._inbox) > seen and not self._calls and time.monotonic() < deadline:
            seen = len(self._inbox)
            self._wake.release()
            try:
                time.sleep(_GATHER_STEP)
            finally:
                self._wake.acquire()

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self.dead = error
            jobs = [*self._inbox, *self.scheduler.waiting, *self.scheduler.batch.jobs]
            calls, self._calls, self._inbox = self._calls, [], []
        for _, future in calls:
            future.set_exception(EngineDeadError(f"the model loop has stopped: {error!r}"))
        for job in jobs:
            job.error = error
            job.end(FinishReason(type="abort", message=repr(error)))
        self._on_news(News(finished=jobs))
        self.on_dead(error)


def _answer(function: Callable[[], Any], future: Future) -> None:
    """Run a control function; its own errors belong to the caller, not to the loop."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
