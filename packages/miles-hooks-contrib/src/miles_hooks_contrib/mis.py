"""Masked importance sampling: weigh or drop what the engine sampled otherwise than the trainer would have.

"Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al. 2025, fengyao.notion.site) and
"When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch" (Liu, Li et al. 2025,
richardli.xyz/rl-collapse). With w the ratio of trainer's to engine's probability, of a token, a response or its
geometric mean: importance sampling (TIS) multiplies the loss by a bounded w, rejection sampling (RS) takes out what
lies outside of bounds of its own, a veto takes out responses with one catastrophic token.
"""

# ruff: noqa: N803, N806  the shape suffixes
# B sequences, R response tokens of all of them

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from miles_hooks_contrib.mismatch_metrics import mismatch_metrics
from miles_hooks_contrib.segments import Level, Segments

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["MisOptions", "compute_mis_weights", "mis"]

_SMALLEST_MEAN = 1e-8
"""A mean weight below this is not divided by."""

_Bound = Annotated[float, msgspec.Meta(gt=0)]


class _Bounds(NamedTuple):
    """Bounds with their defaults filled in."""

    tis_low: float
    tis_high: float
    rs_low: float
    rs_high: float


class MisOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How importance ratios are bounded, and what is rejected; in effect with --use-tis."""

    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    """What happens to a ratio outside of the bounds: cut at the upper one (truncate), kept between both (clip), or its
    tokens leave the loss (mask)."""
    tis_level: Level = "token"
    """What has a ratio: each token, a whole response (the product of its tokens'), or its geometric mean."""
    tis_upper_bound: _Bound = 2.0
    """Upper bound of the importance ratio."""
    tis_lower_bound: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Lower bound of the importance ratio, for clip and mask; default: 1 / --tis-upper-bound."""
    tis_batch_normalize: bool = False
    """Divide the bounded ratios by their mean over the micro-batch: over tokens at token level, else over responses."""
    use_rs: bool = False
    """Take out of the loss what has a ratio outside of --rs-lower-bound and --rs-upper-bound."""
    rs_level: Level = "token"
    """What is taken out: tokens, or whole responses by their ratio or its geometric mean."""
    rs_lower_bound: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Lower bound of what is kept; default: that of the importance ratio."""
    rs_upper_bound: _Bound | None = None
    """Upper bound of what is kept; default: that of the importance ratio."""
    rs_veto_threshold: _Bound | None = None
    """Take out a whole response if one token's ratio is below this, such as 1e-4; default: no veto."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for bounds that leave nothing, and for those of a rejection that is off."""
        _bounds(self)
        names = ("rs_lower_bound", "rs_upper_bound", "rs_veto_threshold")
        given = [name for name in names if getattr(self, name) is not None]
        if given and not self.use_rs:
            raise ValueError(f"--{given[0].replace('_', '-')} has no effect without --use-rs: add it, or leave it out")


def _bounds(options: Any) -> _Bounds:
    """Fill in the bounds that are not given. Raises `ValueError` where a lower one is not below its upper one."""
    high = options.tis_upper_bound
    low = options.tis_lower_bound if options.tis_lower_bound is not None else 1.0 / high
    if options.tis_mode != "truncate" and not low < high:
        raise ValueError(
            f"--tis-lower-bound {low:g} is not below --tis-upper-bound {high:g}"
            + (": its default is 1 / --tis-upper-bound, so give it too" if options.tis_lower_bound is None else "")
        )
    if not options.use_rs:
        return _Bounds(low, high, low, high)
    rs_low = options.rs_lower_bound if options.rs_lower_bound is not None else low
    rs_high = options.rs_upper_bound if options.rs_upper_bound is not None else high
    if not rs_low < rs_high:
        raise ValueError(
            f"rejection keeps nothing: its lower bound {rs_low:g} is not below its upper bound {rs_high:g}; set "
            "--rs-lower-bound and --rs-upper-bound, which default to those of the importance ratio"
        )
    return _Bounds(low, high, rs_low, rs_high)


def compute_mis_weights(
    args: Any, *, train_log_probs: list[Tensor], rollout_log_probs: list[Tensor], loss_masks: list[Tensor]
) -> tuple[list[Tensor] | None, list[Tensor], dict[str, list[Tensor]]]:
    """Return the weight of each token, the masks without what is rejected, and metrics of each token.

    Called with one 1-D tensor a response in each list; `args` has `use_tis` and the fields of `MisOptions`. Results are
    lists of fp32 tensors of the same lengths, without gradient. Weights are 0 at masked tokens and not at rejected
    ones, which only the masks take out. Without `use_tis` there are no weights (None), the masks are those given, and
    the metrics are those of `mismatch_metrics`.

    What decides the result, in this order: ratios are made from the given masks; rejection is judged by unbounded
    ratios, and adds to what mask mode took out; the veto, part of rejection, looks at each unmasked token's own ratio;
    normalisation comes last, over all given tokens, rejected ones too.

    Raises:
        ValueError: the lists do not fit each other, or the bounds leave nothing.
    """
    if not len(train_log_probs) == len(rollout_log_probs) == len(loss_masks):
        counts = f"{len(train_log_probs)}, {len(rollout_log_probs)} and {len(loss_masks)}"
        raise ValueError(f"train_log_probs, rollout_log_probs and loss_masks have {counts} responses")
    for index, parts in enumerate(zip(train_log_probs, rollout_log_probs, loss_masks, strict=True)):
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"response {index} has shapes {', '.join(str(tuple(part.shape)) for part in parts)}")
    segments = Segments(loss_masks)
    weights_R, masks_R, metrics = _weights(args, segments, torch.cat(train_log_probs), torch.cat(rollout_log_probs))
    if weights_R is None:
        masks, weights = loss_masks, None
    else:
        masks, weights = segments.split(masks_R), segments.split(weights_R)
    return weights, masks, {name: segments.split(values_R) for name, values_R in metrics.items()}


def mis(
    args: Args,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **_unused: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Weigh the loss and reject tokens as `MisOptions` say; metrics are those of `compute_mis_weights` with `mis_`
    before their names.

    The `importance_weights` hook `mis`, called as its stub says.
    """
    segments = Segments(loss_masks)
    weights_R, masks_R, found = _weights(args, segments, torch.cat(train_log_probs), torch.cat(rollout_log_probs))
    metrics = {f"mis_{name}": values_R for name, values_R in found.items()}
    if weights_R is None:
        return pg_loss, loss_masks, metrics
    return pg_loss * weights_R, segments.split(masks_R), metrics


mis.options = MisOptions  # type: ignore[attr-defined]


@torch.no_grad()
def _weights(
    args: Any, segments: Segments, train_R: Tensor, rollout_R: Tensor
) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
    """Return weights, masks and metrics of all tokens, each (R,) in fp32."""
    log_ratio_R = segments.only(train_R.float() - rollout_R.float())
    sums_B = segments.sums(log_ratio_R)
    metrics = mismatch_metrics(segments, segments.only(train_R.float()), log_ratio_R, sums_B)
    if not args.use_tis:
        return None, segments.mask_R, metrics
    bounds = _bounds(args)
    ratio_R = segments.ratios(log_ratio_R, args.tis_level, sums_B)
    weights_R, masks_R = _bounded(args.tis_mode, ratio_R, segments.mask_R, bounds, metrics)
    metrics |= {"tis_weight_before_bound": ratio_R, "tis_weight_after_bound": weights_R}
    if args.use_rs:
        judged_R = ratio_R if args.rs_level == args.tis_level else segments.ratios(log_ratio_R, args.rs_level, sums_B)
        metrics |= _outside("rs_mask", judged_R, bounds.rs_low, bounds.rs_high)
        masks_R = masks_R * ((judged_R >= bounds.rs_low) & (judged_R <= bounds.rs_high))
        if args.rs_veto_threshold is not None:
            masks_R = masks_R * _veto(segments, log_ratio_R, args.rs_veto_threshold, metrics)
    metrics["is_ratio_mean_after_tis_rs"] = weights_R
    if args.tis_batch_normalize:
        factor = _batch_mean(segments, weights_R, args.tis_level)
        factor = torch.where(factor > _SMALLEST_MEAN, factor, 1.0).float()
        weights_R = weights_R / factor
        metrics["batch_norm_factor"] = factor.expand_as(weights_R)
    metrics |= segments.spread_all(
        {
            "is_ratio_mean_final": segments.means(weights_R),
            "is_ratio_min_final": segments.smallest(weights_R),
            "is_ratio_max_final": segments.largest(weights_R),
        }
    )
    metrics["kept_fraction"] = (masks_R != 0).float()
    return weights_R, masks_R, metrics


def _bounded(
    mode: str, ratio_R: Tensor, mask_R: Tensor, bounds: _Bounds, metrics: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the weights and the masks that a mode makes of ratios."""
    low, high = bounds.tis_low, bounds.tis_high
    if mode == "truncate":
        metrics["tis_truncate_fraction"] = (ratio_R > high).float()
        return ratio_R.clamp(max=high) * mask_R, mask_R
    if mode == "clip":
        metrics |= _outside("tis_clip", ratio_R, low, high)
        return ratio_R.clamp(low, high) * mask_R, mask_R
    if mode == "mask":
        metrics |= _outside("tis_mask", ratio_R, low, high)
        return ratio_R * mask_R, mask_R * ((ratio_R >= low) & (ratio_R <= high))
    raise ValueError(f"there is no mode {mode!r}: use truncate, clip or mask")


def _outside(name: str, ratio_R: Tensor, low: float, high: float) -> dict[str, Tensor]:
    return {f"{name}_fraction_low": (ratio_R < low).float(), f"{name}_fraction_high": (ratio_R > high).float()}


def _veto(segments: Segments, log_ratio_R: Tensor, threshold: float, metrics: dict[str, Tensor]) -> Tensor:
    """Return 0 for the tokens of responses with a catastrophic token, 1 for others; (R,)."""
    catastrophic_R = (log_ratio_R < math.log(threshold)) & segments.kept_R
    vetoed_R = segments.spread(segments.any(catastrophic_R))
    metrics |= {"rs_catastrophic_token_fraction": catastrophic_R.float(), "rs_catastrophic_seq_fraction": vetoed_R}
    return 1.0 - vetoed_R


def _batch_mean(segments: Segments, weights_R: Tensor, level: Level) -> Tensor:
    """Return the mean weight of tokens, or of responses, one that is masked throughout counting as 0."""
    if level == "token":
        return segments.sums(weights_R).sum() / segments.weights_B.sum().clamp_min(1.0)
    return segments.means(weights_R).mean()
