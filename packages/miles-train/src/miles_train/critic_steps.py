"""What a rollout does with the critic of ppo: its optimizer steps, and how good its values were."""

# ruff: noqa: N806  the shape suffix: R response tokens of the rollout

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from miles_train.megatron import init
from miles_train.objective import add_loss_metrics
from miles_train.seen import check_seen

if TYPE_CHECKING:
    from miles_train.metrics import Metrics, PhaseClock
    from miles_train.models import Trained
    from miles_train.objective import Plan, Step
    from miles_train.passes import Passes

__all__ = ["critic_step", "finish_explained_variance", "value_errors"]


def critic_step(
    passes: Passes, critic: Trained, step: Step, plan: Plan, data: dict[str, Any], *,
    metrics: Metrics, clock: PhaseClock, where: str
) -> None:  # fmt: skip
    """Take one optimizer step of the critic; metrics average over the steps of the rollout.

    Called after the policy's step of the same number. `plan` has the same samples as the policy's and leaves none out.
    """
    with clock.phase("critic"):
        results, seen = passes.critic_backward(critic.model, step, data)
        check_seen(seen, where, "the value loss", "values")
        rate = critic.optimizer.learning_rate
        _, grad_norm = critic.optimizer.step()
    weight = 1.0 / len(plan.steps)
    add_loss_metrics(metrics, results, step, loss_weight=weight, weight=weight)
    share = weight / init.data_parallel_size()
    metrics.add("critic_grad_norm", grad_norm * share)
    metrics.add("critic_lr", rate * share)


def value_errors(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return sums over unmasked tokens, fp64, of which `finish_explained_variance` makes one metric.

    Called once a rollout, when advantages are set, on ranks that have values. The values are those before the rollout's
    first step, which it was not trained on.
    """
    kept_R = torch.cat(data["loss_masks"]) != 0
    returns_R = torch.cat(data["returns"])[kept_R].double()
    errors_R = returns_R - torch.cat(data["values"])[kept_R].double()
    sums = {
        "tokens": kept_R.sum(),
        "returns": returns_R.sum(),
        "returns_squared": returns_R.square().sum(),
        "errors": errors_R.sum(),
        "errors_squared": errors_R.square().sum(),
    }
    return {f"value_errors_{part}": total for part, total in sums.items()}


def finish_explained_variance(numbers: dict[str, float]) -> dict[str, float]:
    """Return the metrics with the sums of `value_errors`, over all ranks, replaced by `explained_variance`.

    It is 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that says the same of all tokens.
    Where all returns are equal there is nothing to explain, and no such metric.
    """
    parts = {name: value for name, value in numbers.items() if name.startswith("value_errors_")}
    named = {name: value for name, value in numbers.items() if name not in parts}
    tokens = parts.get("value_errors_tokens", 0.0)
    if not tokens:
        return named
    returns, errors = (
        parts[f"value_errors_{of}_squared"] / tokens - (parts[f"value_errors_{of}"] / tokens) ** 2
        for of in ("returns", "errors")
    )
    # Squares in fp64 leave about this much of returns that are all equal.
    least = 1e-12 * parts["value_errors_returns_squared"] / tokens
    return named | ({"explained_variance": 1.0 - errors / returns} if returns > least else {})
