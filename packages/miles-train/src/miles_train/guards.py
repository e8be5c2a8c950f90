"""Stop at the first NaN or infinity, and name the tensor and the sample it is in."""

# ruff: noqa: N803  the shape suffix: R response tokens

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_api.errors import MilesError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["check_columns", "check_finite", "check_finite_losses", "check_finite_numbers"]


def check_finite(
    name: str,
    values_R: Tensor,
    lengths: Sequence[int],
    sample_indices: Sequence[int],
    where: str = "",
    error: type[MilesError] = MilesError,
) -> None:
    """Raise if token values hold NaN or infinity; `values_R` is the concatenation over samples of `lengths`.

    One test while all is well; the culprit is looked for only on failure.

    Raises:
        error: naming the tensor, the sample index, the position in it and the value found.
    """
    if bool(torch.isfinite(values_R).all()):
        return
    for values, index in zip(values_R.split(list(lengths)), sample_indices, strict=True):
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            position = int(bad[0])
            raise error(
                f"{name} of sample {index}{where} is {values[position].item()} at position {position} of {len(values)} "
                f"({len(bad)} such values in this sample)"
            )


def check_columns(rollout_data: Mapping[str, Any], names: Iterable[str], where: str = "") -> None:
    """Raise `MilesError` if one of these columns of token values is there and holds NaN or infinity."""
    for name in names:
        if name in rollout_data:
            lengths, indices = rollout_data["response_lengths"], rollout_data["sample_indices"]
            check_finite(name, torch.cat(rollout_data[name]), lengths, indices, where)


def check_finite_numbers(name: str, values: Sequence[float], sample_indices: Sequence[int], where: str = "") -> None:
    """Raise `MilesError` naming the first sample whose number is NaN or infinite; `values` has one a sample."""
    if all(map(math.isfinite, values)):
        return
    index, value = next((i, v) for i, v in zip(sample_indices, values, strict=True) if not math.isfinite(v))
    raise MilesError(f"{name} of sample {index}{where} is {value}")


def check_finite_losses(
    losses: Sequence[Tensor],
    samples: Sequence[Sequence[int]],
    where: str = "",
    name: str = "the loss",
    made_of: str = "log_probs",
) -> None:
    """Raise `MilesError` if a micro-batch's loss is NaN or infinite; `samples` has the indices in each micro-batch."""
    if not losses or bool(torch.isfinite(torch.stack(list(losses))).all()):
        return
    loss, indices = next((x, i) for x, i in zip(losses, samples, strict=True) if not torch.isfinite(x))
    raise MilesError(
        f"{name}{where} is {loss.item()} for the micro-batch of samples {', '.join(map(str, indices))}, "
        f"although their {made_of} are finite"
    )
