"""What the passes of an optimizer step showed, and the look at it before the weights change."""

# ruff: noqa: N803, N806, N815  the shape suffix: R response tokens

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from miles_train.guards import check_finite, check_finite_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Seen", "check_seen", "watch_gradient"]

_RATIOS = {
    ("log_probs", "log_probs"): (1, "the importance ratio exp(log_prob - old log_prob)"),
    ("log_probs", "ref_log_probs"): (-1, "the ratio exp(log_prob of the reference - log_prob)"),
}
"""What a loss takes the exponential of, by what the model gave and the column that it is compared with."""


class Seen(NamedTuple):
    """One micro-batch's passes, kept until the guards have looked at them."""

    batch: dict[str, Any]
    """The columns of the micro-batch."""
    output_R: Tensor
    """Detached log-probs, or values of a critic, of all response tokens; empty where the loss asked for none."""
    loss: Tensor
    """Detached scalar, divided by the step's denominator."""
    pulls: Sequence[Tensor] = ()
    """Gradients of the loss by these, (R,) each: one for each time that the loss asked for them; filled in by the
    backward pass."""


def watch_gradient(output_R: Tensor, pulls: list[Tensor]) -> None:
    """Let the backward pass append the gradient of the loss by `output_R` to `pulls`, if the loss depends on it."""

    def note(gradient_R: Tensor | None) -> None:
        # An output that another one stands beside may have none.
        if gradient_R is not None:
            pulls.append(gradient_R)

    if output_R.requires_grad:
        output_R.register_hook(note)


def check_seen(seen: Sequence[Seen], where: str, loss_name: str = "the loss", output: str = "log_probs") -> None:
    """Stop if what the model gave, a loss, or its gradient by what the model gave is not finite; called after the
    passes of a step, before the optimizer.

    `where` names the rollout and the step, `loss_name` the loss and the hooks it went through, `output` what the model
    gave for each token. `seen` is empty on pipeline stages before the last.

    Raises:
        MilesError: naming the first sample with such a number, or the first micro-batch with such a loss.
    """
    passed = [one for one in seen if len(one.output_R)]
    _check(output, passed, [one.output_R for one in passed], where)
    losses = [one.loss for one in seen]
    if losses and not bool(torch.isfinite(torch.stack(losses)).all()):
        _blame_ratio(output, [one for one in passed if not torch.isfinite(one.loss)], where)
        check_finite_losses(losses, [one.batch["sample_indices"] for one in seen], where, loss_name, output)
    # The loss may be finite where its gradient is not: 0 times infinity is 0 only in the forward pass.
    pulled = [(one, pull_R) for one in passed for pull_R in one.pulls]
    if pulled and not bool(torch.isfinite(torch.cat([pull_R for _, pull_R in pulled])).all()):
        _blame_ratio(output, [one for one, pull_R in pulled if not bool(torch.isfinite(pull_R).all())], where)
        name = f"the gradient of {loss_name} by {output}"
        _check(name, [one for one, _ in pulled], [pull_R for _, pull_R in pulled], where)


def _check(name: str, seen: Sequence[Seen], values: Sequence[Tensor], where: str) -> None:
    """Raise if token values hold NaN or infinity, one tensor for each of `seen`."""
    if values:
        lengths = [n for one in seen for n in one.batch["response_lengths"]]
        indices = [i for one in seen for i in one.batch["sample_indices"]]
        check_finite(name, torch.cat(list(values)), lengths, indices, where)


def _blame_ratio(output: str, seen: Sequence[Seen], where: str) -> None:
    """Raise if a ratio of an unmasked token is too large for a number: then the loss is not to blame."""
    for (given, column), (sign, name) in _RATIOS.items():
        compared = [one for one in seen if given == output and column in one.batch]
        ratios = []
        for one in compared:
            kept_R = torch.cat(one.batch["loss_masks"]) != 0
            log_ratio_R = sign * (one.output_R - torch.cat(one.batch[column]))
            ratios.append(torch.where(kept_R, log_ratio_R, 0.0).exp())
        _check(name, compared, ratios, where)
