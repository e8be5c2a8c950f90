"""Prompts that begin alike go to the same engine, which has the beginning in its cache.

Engines keep the keys and values of a prompt by prefix. What each of them probably holds is tracked here as chained
hashes of the prompt's blocks, a radix tree in a flat table: the hash of a block covers everything before it, so the
longest known chain is the longest shared prefix, to a block. Nothing is decoded: equal prompts are equal bytes in JSON
too, and a prompt that is not found costs affinity, never an answer.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING

from .policies import LeastOutstanding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .policies import RouteRequest
    from .workers import Worker

__all__ = ["PrefixAware", "prompt_bytes"]

_BLOCK = 256
_MAX_PROMPT = 64 << 10
"""Bytes of a prompt that are looked at: those behind share its way anyway."""
_MAX_BLOCKS = 200_000
"""Blocks remembered, the longest unused forgotten first: about 40 MB."""
_SKEW_REQUESTS = 32
_SKEW_RATIO = 1.5
_MIN_SHARE = 0.3
"""The least part of a prompt that has to be known for its engine to be preferred to an idler one."""

_SEARCHED = 256 << 10
"""Bytes of a body in which the prompt has to begin."""
_MAX_HOLDERS = 8
_BACKSLASH = 0x5C

_PROMPT = re.compile(rb'(?<!\\)"(input_ids|text|messages|prompt)"\s*:\s*(["\[])')


def prompt_bytes(body: bytes) -> bytes:
    """Return the prompt of a request as its body spells it: text, token ids or messages; empty if there is none.

    At most 64 KiB of it.
    """
    found = _PROMPT.search(body, 0, _SEARCHED)
    if found is None:
        return b""
    start = found.end()
    limit = min(start + _MAX_PROMPT, len(body))
    if found[2] == b'"':
        end = _string_end(body, start, limit)
    else:  # brackets nest in messages: what follows them is looked at too
        end = -1 if found[1] == b"messages" else body.find(b"]", start, limit)
    return body[start : limit if end < 0 else end]


def _string_end(body: bytes, start: int, limit: int) -> int:
    """Return where the JSON string that begins at `start` ends, or -1 if not before `limit`."""
    end = start - 1
    while (end := body.find(b'"', end + 1, limit)) >= 0:
        before = end
        while before > start and body[before - 1] == _BACKSLASH:
            before -= 1
        if (end - before) % 2 == 0:
            return end
    return -1


def _chain(prompt: bytes) -> Iterator[int]:
    """Yield the hash of each block, which covers all before it; the last block may be short."""
    before = 0
    for start in range(0, len(prompt), _BLOCK):
        before = hash((before, prompt[start : start + _BLOCK]))
        yield before


class PrefixAware:
    """Prefer an engine that was sent the longest part of this prompt before, unless the load has become uneven.

    Uneven is when the busiest has 32 requests more, and half as many again, as the idlest.
    """

    def __init__(self, max_blocks: int = _MAX_BLOCKS) -> None:
        self._idlest = LeastOutstanding()
        self._max_blocks = max_blocks
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def choose(self, workers: Sequence[Worker], request: RouteRequest, /) -> Worker:
        """Return the idlest of those that probably hold the longest prefix; from now on it holds all of the prompt."""
        if len(workers) == 1:
            return workers[0]
        chain = list(_chain(prompt_bytes(request.body)))
        holding = [] if _is_skewed(workers) else self._holding(chain, workers)
        worker = self._idlest.choose(holding or workers, request)
        self._note(chain, worker.url)
        return worker

    def _holding(self, chain: list[int], workers: Sequence[Worker]) -> list[Worker]:
        held: list[Worker] = []
        for number, block in enumerate(chain, 1):
            urls = self._holders.get(block, ())
            now = [worker for worker in workers if worker.url in urls]
            if not now:
                return held if number - 1 >= _MIN_SHARE * len(chain) else []
            held = now
        return held

    def _note(self, chain: list[int], url: str) -> None:
        table = self._holders
        # from the end: of a prompt that is forgotten in parts, the beginning is of the most use
        for block in reversed(chain):
            urls = table.get(block, ())
            if url not in urls:
                table[block] = (url, *urls[: _MAX_HOLDERS - 1])
            table.move_to_end(block)
        while len(table) > self._max_blocks:
            table.popitem(last=False)


def _is_skewed(workers: Sequence[Worker]) -> bool:
    loads = [worker.outstanding for worker in workers]
    most, least = max(loads), min(loads)
    return most - least > _SKEW_REQUESTS and most > _SKEW_RATIO * least
