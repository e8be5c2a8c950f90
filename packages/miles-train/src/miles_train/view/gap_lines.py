"""Read `mismatch.jsonl`: one line a rollout of how far trainer and engines were apart on its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from miles_train.token_gap_types import BINS_PER_DECADE, LOWEST_DECADE, NUM_BINS, Source, WorstToken

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

    @property
    def fits(self) -> bool:
        """Whether its bins are those of this version, and every source has tokens: lines can be added up then."""
        same_scale = (self.lowest_decade, self.bins_per_decade) == (LOWEST_DECADE, BINS_PER_DECADE)
        return same_scale and all(len(one.bins) == NUM_BINS and one.tokens > 0 for one in self.sources)


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
                continue
            if read.fits:
                found[read.rollout_id] = read
            else:
                broken += 1
    if broken:
        problems.append(f"{path.name}: {broken} line{'s' if broken > 1 else ''} could not be read")
    return [found[rollout_id] for rollout_id in sorted(found)]
