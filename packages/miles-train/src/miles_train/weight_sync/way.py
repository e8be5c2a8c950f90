"""What each way from the trainer to engines offers, and what it is told of a push."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from miles_train.weight_sync.engine import EngineGoneError
from miles_train.weight_sync.verify import Reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.services import Endpoint

__all__ = ["Gone", "Push", "Way", "ask_all", "without"]

Gone = list[tuple["Endpoint", EngineGoneError]]


class Push(msgspec.Struct, eq=False):
    """One version of the weights on its way."""

    version: str
    due: bool
    """Whether it is checked."""
    staged: bool = False
    """Whether the engines serve the old weights until `finish`, so that requests go on until then."""
    folder: Path | None = None
    """Where the weights lie, if they do."""
    checksums: dict[str, str] = {}
    dtype: str = ""
    reference: Reference | None = None
    """Against what engines are checked, once it is known."""


class Way(Protocol):
    """How weights get from the trainer to engines."""

    def prepare(self, push: Push) -> None:
        """Do once for a push what does not need engines; nothing is left if it fails."""
        ...

    def deliver(self, endpoints: list[Endpoint], push: Push) -> Gone:
        """Give engines all weights; return those that died. Raises `ServiceError` if one does not take them.

        They are paused unless the push is staged. Fills `checksums` and `dtype` of a push that is checked.
        """
        ...

    def finish(self, endpoints: list[Endpoint], push: Push) -> Gone:
        """Let paused engines serve what was delivered; return those that died. Raises as `deliver` does."""
        ...

    def hand(self, endpoint: Endpoint, push: Push) -> bool:
        """Give one new engine the weights of an earlier push; False if they are not to be had any more.

        Raises `EngineGoneError`, and `ServiceError` as `deliver` does.
        """
        ...

    def retire(self, push: Push) -> None:
        """Drop what `prepare` made: a newer push is ready."""
        ...

    def close(self) -> None:
        """Drop everything."""
        ...


def ask_all(pool: ThreadPoolExecutor, endpoints: list[Endpoint], question: Callable[[Endpoint], Any]) -> Gone:
    """Ask all engines at once; return those that did not answer. Raises what else any of them raised."""
    asked = [(endpoint, pool.submit(question, endpoint)) for endpoint in endpoints]
    wait([future for _, future in asked])
    gone: Gone = []
    for endpoint, future in asked:
        try:
            future.result()
        except EngineGoneError as error:
            gone.append((endpoint, error))
    return gone


def without(endpoints: list[Endpoint], gone: Gone) -> list[Endpoint]:
    """Return the engines that are not among those that died."""
    return [one for one in endpoints if not any(one is dead for dead, _ in gone)]
