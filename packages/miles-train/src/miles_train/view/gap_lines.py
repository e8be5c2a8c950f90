"""Read `mismatch.jsonl`: one line a rollout of how far trainer and engines were apart on its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from miles_train.token_gap_types import Source, WorstToken

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["GAPS", "GapLine", "read_gaps"]

GAPS = "mismatch.jsonl"


class GapLine(msgspec.Struct):
    """The tokens of one rollout."""

    rollout_id: int
    lowest_decade: int
    bins_per_decade: int
    sources: list[Source] = []
    worst: list[WorstToken] = []


def read_gaps(path: Path, problems: list[str]) -> list[GapLine]:
    """Return the lines by rollout id, of a rollout done twice the later one; lines that cannot be read are told."""
    if not path.is_file():
        return []
    found: dict[int, GapLine] = {}
    broken = 0
    decoder = msgspec.json.Decoder(GapLine)
    with path.open("rb") as lines:
        for line in lines:
            try:
                read = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                broken += 1
            else:
                found[read.rollout_id] = read
    if broken:
        problems.append(f"{path.name}: {broken} line{'s' if broken > 1 else ''} could not be read")
    return [found[rollout_id] for rollout_id in sorted(found)]
