"""Where trainer and engine disagree: a histogram of token gaps for each engine and version of weights, worst tokens.

The gap of a sampled token is how far the trainer's log-prob is from the engine's. What is kept of a rollout does not
grow with it: counts in bins that are equally wide on a logarithmic scale, a few sums, and `MOST_WORST` tokens with a
few others around them.
"""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, R response tokens of the micro-batch, K kept ones, S sources

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from miles_train.reducers import segment_ids
from miles_train.token_gap_types import BINS_PER_DECADE, LOWEST_DECADE, NUM_BINS, Source, WorstToken

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["MOST_WORST", "TokenGaps"]

MOST_WORST = 8
MOST_SOURCES = 64
OTHERS = "others"
"""Engine and version of what came from more sources than are told apart."""
_BEFORE, _AFTER = 16, 8
"""Tokens around a worst one."""
_EDGES = 10.0 ** (LOWEST_DECADE + torch.arange(NUM_BINS - 1, dtype=torch.float64) / BINS_PER_DECADE)


class TokenGaps:
    """The gaps of one rollout on one rank; after `merge`, of all of them."""

    def __init__(self) -> None:
        self.sources: dict[tuple[str, str], Source] = {}
        self.worst: list[WorstToken] = []

    def add(self, log_probs_R: Tensor, batch: dict[str, Any]) -> None:
        """Count each unmasked response token of one micro-batch once; nothing without `rollout_log_probs`."""
        if "rollout_log_probs" not in batch or not len(log_probs_R):
            return
        kept_K = (torch.cat(batch["loss_masks"]) != 0).nonzero().squeeze(1)
        if not len(kept_K):
            return
        names_B = _names(batch)
        rollout_R = torch.cat(batch["rollout_log_probs"])
        # fp64, and on the host: sums of a few numbers a source.
        log_ratio_K = (log_probs_R - rollout_R)[kept_K].double().cpu()
        samples_K = segment_ids(batch["response_lengths"], kept_K.device)[kept_K].cpu()
        # A source whose tokens are all masked is none.
        known = {names_B[sample]: 0 for sample in samples_K.unique().tolist()}
        known = {name: place for place, name in enumerate(known)}
        sources_K = torch.tensor([known.get(name, 0) for name in names_B])[samples_K]
        self._count(log_ratio_K, sources_K, list(known))
        self._keep_worst(log_ratio_K, kept_K.cpu(), samples_K, (log_probs_R, rollout_R), batch, names_B)

    def merge(self, sources: Iterable[Source], worst: Sequence[WorstToken]) -> None:
        """Add what another rank found."""
        for source in sources:
            self._source(source.engine, source.version).add(source)
        self.worst = heapq.nlargest(MOST_WORST, [*self.worst, *worst], key=lambda token: token.gap)

    def report(self) -> dict[str, Any]:
        """Return the line of a rollout in `mismatch.jsonl`; empty where nothing was compared."""
        if not self.sources:
            return {}
        scale = {"lowest_decade": LOWEST_DECADE, "bins_per_decade": BINS_PER_DECADE}
        return msgspec.to_builtins({**scale, "sources": list(self.sources.values()), "worst": self.worst})

    def _source(self, engine: str, version: str) -> Source:
        key = (engine, version)
        if key not in self.sources and len(self.sources) >= MOST_SOURCES:
            key = (OTHERS, OTHERS)
        return self.sources.setdefault(key, Source(engine=key[0], version=key[1]))

    def _count(self, log_ratio_K: Tensor, sources_K: Tensor, names: list[tuple[str, str]]) -> None:
        gap_K = log_ratio_K.abs()
        places_K = sources_K * NUM_BINS + torch.bucketize(gap_K, _EDGES, right=True)
        bins_S = torch.bincount(places_K, minlength=len(names) * NUM_BINS).reshape(len(names), NUM_BINS).tolist()
        zeros_S = gap_K.new_zeros(len(names))
        gaps_S = zeros_S.index_add(0, sources_K, gap_K).tolist()
        ratios_S = zeros_S.index_add(0, sources_K, log_ratio_K).tolist()
        largest_S = zeros_S.scatter_reduce(0, sources_K, gap_K, "amax").tolist()
        for (engine, version), bins, gap, ratio, largest in zip(
            names, bins_S, gaps_S, ratios_S, largest_S, strict=True
        ):
            found = Source(engine=engine, version=version, tokens=sum(bins), gap=gap, log_ratio=ratio, largest=largest,
                           bins=bins)  # fmt: skip
            self._source(engine, version).add(found)

    def _keep_worst(
        self,
        log_ratio_K: Tensor,
        kept_K: Tensor,
        samples_K: Tensor,
        log_probs: tuple[Tensor, Tensor],
        batch: dict[str, Any],
        names_B: list[tuple[str, str]],
    ) -> None:
        starts = [0]
        for length in batch["response_lengths"]:
            starts.append(starts[-1] + length)
        found = []
        for place in log_ratio_K.abs().topk(min(MOST_WORST, len(kept_K))).indices.tolist():
            token, sample = int(kept_K[place]), int(samples_K[place])
            position = token - starts[sample]
            sequence = batch["tokens"][sample]
            at = len(sequence) - batch["response_lengths"][sample] + position
            first = max(0, at - _BEFORE)
            found.append(
                WorstToken(
                    gap=abs(float(log_ratio_K[place])),
                    trainer=float(log_probs[0][token]),
                    rollout=float(log_probs[1][token]),
                    sample=batch["sample_indices"][sample],
                    position=position,
                    tokens=sequence[first : at + 1 + _AFTER].tolist(),
                    at=at - first,
                    engine=names_B[sample][0],
                    version=names_B[sample][1],
                )
            )
        self.merge((), found)


def _names(batch: dict[str, Any]) -> list[tuple[str, str]]:
    """Return each sample's engine and version; of several, the first and the last."""
    count = len(batch["tokens"])
    columns = [batch.get(name) or [[]] * count for name in ("engines", "weight_versions")]
    return list(zip(*([_joined(entry) for entry in column] for column in columns), strict=True))


def _joined(names: Sequence[Any] | None) -> str:
    if not names:
        return ""
    return str(names[0]) if len(names) == 1 else f"{names[0]} … {names[-1]}"
