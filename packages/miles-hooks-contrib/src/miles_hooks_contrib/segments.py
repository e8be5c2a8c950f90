"""A batch of sequences as one tensor of tokens, with sums over each: what importance-weight hooks compute on."""

# ruff: noqa: N803, N806  the shape suffixes
# B sequences, R response tokens of all of them

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SAFETY_BOUND", "Level", "Segments", "bounded_exp"]

SAFETY_BOUND = 20.0
"""Nats within which a log-ratio is kept before its exp."""

Level = Literal["token", "sequence", "geometric"]
"""What has a ratio: each token, a whole response (their product), or a response as the geometric mean of its tokens."""


def bounded_exp(log_ratios: Tensor) -> Tensor:
    """Return importance ratios, from log-ratios kept within ±20."""
    return log_ratios.clamp(-SAFETY_BOUND, SAFETY_BOUND).exp_()


class Segments:
    """The masks of B sequences, concatenated, and reductions of token values under them."""

    def __init__(self, loss_masks: Sequence[Tensor]) -> None:
        self.mask_R = torch.cat(list(loss_masks)).float()
        self.kept_R = self.mask_R != 0
        """True where a token counts."""
        self.lengths = [len(mask) for mask in loss_masks]
        self._lengths_B = torch.tensor(self.lengths, device=self.mask_R.device)
        self._ids_R = torch.repeat_interleave(self._lengths_B, output_size=len(self.mask_R))
        self.weights_B = self._reduced(self.mask_R.double(), "sum", 0.0)
        """The mask sum of each sequence, fp64."""

    def only(self, values_R: Tensor) -> Tensor:
        """Return the values with 0 for masked tokens, which may hold anything."""
        return torch.where(self.kept_R, values_R, 0.0)

    def sums(self, values_R: Tensor) -> Tensor:
        """Return each sequence's masked sum, (B,) in fp64: a long response adds up thousands of small numbers.

        Values of masked tokens must be finite.
        """
        return self._reduced((values_R * self.mask_R).double(), "sum", 0.0)

    def means(self, values_R: Tensor) -> Tensor:
        """Return each sequence's masked mean, (B,) in fp64; 0 where nothing is unmasked."""
        return self.sums(values_R) / self.weights_B.clamp_min(1.0)

    def smallest(self, values_R: Tensor) -> Tensor:
        """Return the smallest unmasked value of each sequence, (B,); 0 where there is none."""
        return self._extreme(values_R, "min", torch.inf)

    def largest(self, values_R: Tensor) -> Tensor:
        """Return the largest unmasked value of each sequence, (B,); 0 where there is none."""
        return self._extreme(values_R, "max", -torch.inf)

    def any(self, flags_R: Tensor) -> Tensor:
        """Say of each sequence whether an unmasked token has the flag, (B,)."""
        return self._reduced((flags_R & self.kept_R).float(), "max", 0.0) > 0

    def spread(self, values_B: Tensor) -> Tensor:
        """Give every token its sequence's value, (R,) in fp32."""
        return values_B.float().index_select(0, self._ids_R)

    def spread_all(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Do the same for several values of each sequence, in one pass."""
        together = torch.stack(list(named.values())).float().index_select(1, self._ids_R)
        return dict(zip(named, together.unbind(0), strict=True))

    def split(self, values_R: Tensor) -> list[Tensor]:
        """Return one tensor a sequence."""
        return list(values_R.split(self.lengths))

    def ratios(self, log_ratio_R: Tensor, level: Level, sums_B: Tensor | None = None) -> Tensor:
        """Return the importance ratio of each token at a level, from log-ratios kept within ±20.

        Log-ratios of masked tokens must be finite; `sums_B` are their `sums`, where these are known.
        """
        if level == "token":
            return bounded_exp(log_ratio_R)
        if level not in ("sequence", "geometric"):
            raise ValueError(f"there is no level {level!r}: use token, sequence or geometric")
        leveled_B = self.sums(log_ratio_R) if sums_B is None else sums_B
        if level == "geometric":
            leveled_B = leveled_B / self.weights_B.clamp_min(1.0)
        return self.spread(bounded_exp(leveled_B))

    def _reduced(self, values_R: Tensor, how: str, initial: float) -> Tensor:
        # One pass in a fixed order: `index_add_` takes twice the time, and on a GPU its sums differ from run to run.
        return torch.segment_reduce(values_R, how, lengths=self._lengths_B, unsafe=True, initial=initial)

    def _extreme(self, values_R: Tensor, how: str, none: float) -> Tensor:
        found_B = self._reduced(torch.where(self.kept_R, values_R, none), how, none)
        return torch.where(found_B == none, 0.0, found_B)
