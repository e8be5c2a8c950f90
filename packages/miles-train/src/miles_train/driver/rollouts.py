"""When rollouts are made: as each is needed (sync), or one step ahead, while the last one trains.

New weights wait until a rollout ahead is made (one-step-off), or come in the middle of it (in-flight).
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from miles_train.driver.remote import Pending, Remote

__all__ = ["Rollout", "Rollouts"]

_STALENESS = "rollout/staleness"


class Rollout(NamedTuple):
    """A rollout that was made."""

    batch: Any
    """A reference to its columns."""
    said: dict[str, Any]
    """What else the rollout process returned: metrics, samples, seconds, hooks."""
    version: int
    """The weights that made it."""


class _Begun(NamedTuple):
    rollout_id: int
    version: int
    call: Pending


class Rollouts:
    """The rollouts of a run in order, each made once.

    Ahead of training, `begin` starts the next one, `settle` waits for it before weights change under it, and `take`
    hands it out. Without `ahead` the first two do nothing, and `take` makes it; `in_flight` nobody settles.
    """

    def __init__(self, service: Remote, count: int, *, ahead: bool, aside: Path, in_flight: bool = False) -> None:
        """`count` is where the run ends; `aside` is a directory of this run alone, there while it is needed."""
        self._service = service
        self._count = count
        self._ahead, self._in_flight = ahead, in_flight
        self._begun: _Begun | None = None
        self._waited = 0.0
        self._aside = aside
        # What a killed run kept there.
        self._forget()

    def take(self, rollout_id: int, version: int, weights: str) -> Rollout:
        """Return this rollout; it is made now, with these weights, if it was not begun before."""
        begun = self._begun or self._begin(rollout_id, version, weights)
        self._wait_for(begun)
        self._begun = None
        self._forget()
        return Rollout(*begun.call.result(), begun.version)

    def begin(self, rollout_id: int, version: int, weights: str, *, saves: bool) -> None:
        """Start to make this rollout, if rollouts are made ahead and it is one of the run.

        `saves` says that a checkpoint will be written before it is trained on: what the rollout process would put into
        it is kept from now, so that a run which continues from there makes this rollout again, and loses no prompt.
        """
        if not self._ahead or rollout_id >= self._count:
            return
        if saves:
            self._aside.mkdir(parents=True)
            self._service.call("save", rollout_id - 1, str(self._aside))
        self._begun = self._begin(rollout_id, version, weights)

    def settle(self) -> None:
        """Wait until a rollout that was begun is made, unless engines may take new weights in the middle of it."""
        if self._begun is not None and not self._in_flight:
            self._wait_for(self._begun)

    def row(self, rollout: Rollout, version: int) -> tuple[dict[str, float], dict[str, float]]:
        """Return metrics and seconds of a rollout that was trained on, by weights of this version.

        Made ahead, its seconds are those that the run has waited since the last row, for this rollout or the next.
        """
        metrics, waited = dict(rollout.said["metrics"]), self._waited
        self._waited = 0.0
        if not self._ahead:
            return metrics, dict(rollout.said["seconds"])
        # What the rollout process reports of tokens counts from the weights that the rollout was begun with.
        ages = {name: age for name, age in metrics.items() if name.startswith(_STALENESS)} or {_STALENESS: 0.0}
        metrics |= {name: age + version - rollout.version for name, age in ages.items()}
        metrics["rollout/made_in_seconds"] = sum(rollout.said["seconds"].values())
        return metrics, {"generate": waited}

    def save(self, rollout_id: int, directory: str) -> None:
        """Write what the rollout process has come to after this rollout, whatever it has begun since."""
        if self._aside.exists():
            shutil.copytree(self._aside, directory, dirs_exist_ok=True)
        else:
            self._service.call("save", rollout_id, directory)

    def close(self) -> None:
        """Remove what was kept aside."""
        self._forget()

    def _wait_for(self, begun: _Begun) -> None:
        started = time.perf_counter()
        begun.call.result()
        self._waited += time.perf_counter() - started

    def _begin(self, rollout_id: int, version: int, weights: str) -> _Begun:
        return _Begun(rollout_id, version, self._service.begin_split("generate", "batch", rollout_id, weights))

    def _forget(self) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)
