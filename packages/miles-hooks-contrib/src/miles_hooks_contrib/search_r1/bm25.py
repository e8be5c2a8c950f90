"""BM25 over a JSONL file of passages, in memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from heapq import nsmallest
from typing import TYPE_CHECKING, Any

import bm25s
import msgspec

from miles_api.errors import DataError
from miles_hooks_contrib.search_r1.retrieval import Document, Hit

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Bm25", "read_corpus"]

_WORD = r"(?u)\b\w+\b"


class _Line(msgspec.Struct):
    """One line of a corpus, in either of the usual forms."""

    id: str | int | None = None
    contents: str | None = None
    title: str = ""
    text: str | None = None


class Bm25:
    """An index of a whole corpus; searches run in a thread of their own, so that the event loop goes on."""

    def __init__(self, file: str) -> None:
        """Read and index `file`. Raises `DataError` naming the line that is no passage."""
        self._documents = list(read_corpus(file))
        if not self._documents:
            raise DataError(f"--search-corpus {file} holds no passage")
        self._index = bm25s.BM25()
        self._index.index(_words([doc.contents for doc in self._documents], ids=True), show_progress=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search_r1")

    def __len__(self) -> int:
        return len(self._documents)

    def find(self, query: str, topk: int) -> list[Hit]:
        """Return the passages that have a word of the query, best first; equals in the order of the file."""
        [words] = _words([query], ids=False)
        if not words:
            return []
        scores = self._index.get_scores(words)
        # bm25s' own choice among equals is arbitrary, and another for another topk.
        best = nsmallest(topk, scores.nonzero()[0].tolist(), key=lambda number: (-scores[number], number))
        return [Hit(self._documents[number], float(scores[number])) for number in best]

    async def search(self, query: str, topk: int) -> list[Hit]:
        """Do what `find` does, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.find, query, topk)

    async def aclose(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def read_corpus(file: str) -> Iterator[Document]:
    """Yield the passages of a JSONL file. Raises `DataError` naming file and line."""
    decoder = msgspec.json.Decoder(_Line)
    try:
        with open(file, "rb") as lines:  # noqa: PTH123  a path as the options hold it
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(decoder, line, f"--search-corpus {file}, line {number}")
    except OSError as error:
        raise DataError(f"--search-corpus {file} cannot be read: {error.strerror}") from error


def _document(decoder: msgspec.json.Decoder[_Line], line: bytes, where: str) -> Document:
    try:
        found = decoder.decode(line)
    except msgspec.DecodeError as error:
        raise DataError(f"{where}: {error}") from error
    if found.contents is not None:
        return Document(found.contents, found.id)
    if found.text is None:
        raise DataError(f"{where} has neither `contents` nor `text`")
    return Document(f"{found.title}\n{found.text}", found.id)


def _words(texts: list[str], *, ids: bool) -> Any:
    return bm25s.tokenize(texts, stopwords="en", token_pattern=_WORD, return_ids=ids, show_progress=False)
