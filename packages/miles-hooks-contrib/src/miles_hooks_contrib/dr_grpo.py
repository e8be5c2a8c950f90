"""Dr.GRPO's loss: divide the sum over a response's tokens by a constant, not by their number (arXiv 2503.20783).

    GRPO      Σ_i (1 / |o_i|) Σ_t ℓ_it        Dr.GRPO      Σ_i (1 / L) Σ_t ℓ_it

A mean over each response makes a long wrong answer cheaper by the token than a short one, and wrong answers grow. The
other half of the paper, advantages without division by the group's spread, is the flag --no-grpo-std-normalization.
"""

# ruff: noqa: N803, N806  the shape suffixes: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import torch

from miles_api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from miles_api.args import Args

__all__ = ["ConstantLength", "DrGrpoOptions"]


class DrGrpoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the sum over a response's tokens is divided by."""

    dr_grpo_length: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """The constant that token losses of a rollout are divided by; default: --rollout-max-response-len."""


class ConstantLength:
    """Reduce the policy loss to the sum over unmasked tokens by a constant.

    What a token adds does not depend on the micro-batch or the rank it is in, so that the step's gradient does not
    depend on how the step is split. The framework divides by the step's rollouts.
    """

    options = DrGrpoOptions

    def __init__(self, args: Args) -> None:
        """Raise `ConfigError` beside --calculate-per-token-loss, which divides by the step's tokens."""
        if args.calculate_per_token_loss:
            raise ConfigError(
                "--custom-pg-loss-reducer-function-path dr_grpo divides by a constant, and --calculate-per-token-loss "
                "by the tokens of a step: drop one"
            )
        self._length = float(args.dr_grpo_length or args.rollout_max_response_len)

    def __call__(
        self,
        total_lengths: list[int],
        response_lengths: list[int],
        loss_masks: list[Tensor],
        calculate_per_token_loss: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        """Return the reducer of one micro-batch. Called for each."""
        mask_R = torch.cat(loss_masks)

        def reduce(values_R: Tensor) -> Tensor:
            # `where`, for a masked token may have any value, and 0 times infinity is not 0.
            return (torch.where(mask_R != 0, values_R, 0.0) * mask_R).sum() / self._length

        return reduce
