"""Training hooks: advantages, loss, importance weights, reduction. They need torch; their stubs do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from miles_api.args import Args


@hook(
    flag="--custom-advantage-function-path",
    since=(1, 0),
    side="train",
    moment="rollout",
    default="what --advantage-estimator names",
)
def advantage(args: Args, rollout_data: dict[str, Any], /) -> None:
    """Set `advantages` and `returns` in `rollout_data`: one fp32 tensor of response length for each sample.

    Called once per rollout on every rank of the last pipeline stage, after log-probs, in the place of the estimator;
    responses are whole. `log_probs` holds the old log-probs of every sample: recomputed, or the engine's with
    `--use-rollout-logprobs`. Values must be finite, those of masked tokens too.
    """
    raise NotImplementedError


@hook(
    flag="--custom-loss-function-path", since=(1, 0), side="train", moment="rollout", default="what --loss-type names"
)
def loss(
    args: Args,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    /,
    *,
    log_probs_and_entropy: Callable[..., Any],
    parallel: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of one micro-batch, with `--loss-type custom_loss`.

    Called for every micro-batch on the last pipeline stage. `log_probs_and_entropy(logits, entropy=False)` gives
    per-sample response tensors, scaled by the rollout temperature and right under TP and CP; it may be called any
    number of times. `logits` are the rows of the packed `batch["tokens"]`, this rank's part of the vocabulary. Where
    the rollout has rewards, the batch has `advantages`, `returns` and the old `log_probs`. Loss and metrics are sums
    over samples (over tokens with `--calculate-per-token-loss`), metrics numbers or scalar tensors; of a metric named
    `…_max` the largest is kept. `sum_of_sample_mean` is the run's own reducer: samples that were fanned out of one
    rollout share its denominator, and `--loss-length-norm` is its constant. The framework divides: the loss by the
    step's rollouts, metrics by those with an unmasked token. `parallel.tp`, `.pp`, `.cp` and `.dp` each have `size`,
    `rank` and `group`.
    """
    raise NotImplementedError


@hook(
    flag="--custom-tis-function-path",
    since=(1, 0),
    side="train",
    moment="rollout",
    by_keyword=True,
    default="truncated importance sampling",
)
def importance_weights(
    args: Args,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    parallel_state: Any,
    max_seq_lens: list[int] | None,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Correct the policy-gradient loss for the gap between trainer and engine.

    Called by keyword for every micro-batch, with `--use-tis` or `--get-mismatch-metrics`; with the latter alone only
    the metrics count. `pg_loss` has length `sum(response_lengths)`. `train_log_probs` are the recomputed old log-probs,
    or the current ones, detached, where none were recomputed. Returns the new loss, finite everywhere; the masks, which
    may take tokens out of the numerators and leave the denominators as they are; and metrics, 1-D over the same tokens,
    averaged with the original masks (of those named `…_max` the largest unmasked one is kept).
    """
    raise NotImplementedError


@hook(
    flag="--custom-pg-loss-reducer-function-path",
    since=(1, 0),
    side="train",
    moment="rollout",
    default="sum of sample means",
)
def pg_loss_reducer(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool = False,
    /,
) -> Callable[[Tensor], Tensor]:
    """Return the function that reduces a per-token policy loss to the sum over this micro-batch's samples.

    Called for every micro-batch with the original masks; whole responses on every CP rank. The function reduces the
    policy loss alone, after importance weights; the entropy bonus and metrics keep the default. The framework divides
    by the step's rollouts, those removed included (by its unmasked tokens with `--calculate-per-token-loss`): samples
    that were fanned out of one rollout count once there, and a mean of each sample counts each of them.
    """
    raise NotImplementedError
