"""Losses: from logits and a micro-batch to a sum over its samples, and metrics that add up the same way.

A loss of the policy is `loss(objective, batch, logits, reduce, *, log_probs_and_entropy) -> (loss, metrics)`; a `loss`
hook has `args` in the place of `objective`, and `parallel`. The critic's has its values in the place of `logits`, and
no `log_probs_and_entropy`. `reduce` is the sum of sample means over the micro-batch; `log_probs_and_entropy(logits,
entropy=False)` returns per-sample lists. Metrics are scalar tensors without gradient, reduced like the loss, except
those named `…_max`, of which the largest is kept.
"""

from miles_train.loss.kl import kl_divergence
from miles_train.loss.policy import policy_loss
from miles_train.loss.sft import sft_loss
from miles_train.loss.value import value_loss

__all__ = ["kl_divergence", "policy_loss", "sft_loss", "value_loss"]
