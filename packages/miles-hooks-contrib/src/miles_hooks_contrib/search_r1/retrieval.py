"""Where passages come from: a corpus in this process or a server, within a deadline and so many at once."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from miles_api.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from miles_hooks_contrib.search_r1.options import SearchOptions

__all__ = ["Document", "Hit", "Query", "Reply", "Retriever", "Searches", "open_retriever"]


class Document(msgspec.Struct, omit_defaults=True):
    """One passage."""

    contents: str
    """Its title, a line break, and its text."""
    id: str | int | None = None


class Hit(msgspec.Struct):
    """A passage that was found, with how well it fits; higher is better."""

    document: Document
    score: float


class Query(msgspec.Struct, omit_defaults=True):
    """What is posted to `/retrieve`."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class Reply(msgspec.Struct):
    """What `/retrieve` answers with `return_scores`: the hits of each query, best first."""

    result: list[list[Hit]]


class Retriever(Protocol):
    """Finds passages; used from one event loop."""

    async def search(self, query: str, topk: int) -> list[Hit]:
        """Return at most `topk` passages, best first; none where nothing fits. Raises `ServiceError`."""
        ...

    async def aclose(self) -> None:
        """Close what is open."""
        ...


class Searches:
    """One run's searches in one event loop: a retriever behind the limits of the options."""

    def __init__(self, retriever: Retriever, options: SearchOptions) -> None:
        self.retriever = retriever
        self._options = options
        self._slots = asyncio.Semaphore(options.search_concurrency)

    async def run(self, query: str) -> list[str]:
        """Return the contents of the passages found. Raises `ServiceError` for a search without a reply in time."""
        async with self._slots:
            try:
                async with asyncio.timeout(self._options.search_timeout):
                    hits = await self.retriever.search(query, self._options.search_topk)
            except TimeoutError as error:
                raise ServiceError(
                    f"the search for {query!r:.100} had no reply within --search-timeout "
                    f"{self._options.search_timeout:g} s"
                ) from error
        return [hit.document.contents for hit in hits]


def open_retriever(options: SearchOptions) -> Retriever:
    """Return the retriever that the options name.

    Raises `ConfigError` if its library is missing, `DataError` for a bad corpus.
    """
    if options.search_corpus is not None:
        return load("bm25", "bm25s").Bm25(options.search_corpus)
    return load("remote", "aiohttp").Remote(options.search_url, options.search_token, options.search_timeout)


def load(module: str, library: str) -> Any:
    """Import one of this package's modules; `ConfigError` says how to get the library it needs."""
    try:
        return importlib.import_module(f"miles_hooks_contrib.search_r1.{module}")
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ConfigError(f'search_r1 needs {library}: pip install "miles-hooks-contrib[search]"') from error
