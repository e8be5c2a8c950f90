"""What every number of a run says, in a sentence."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from miles_api.errors import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CAUSE", "CAUSES", "REWARD_PART", "explain", "unsaid"]

CAUSE = "train/zero_gradient/"
"""How the names of metrics begin that count the optimizer steps that changed nothing, by cause."""
REWARD_PART = "rollout/reward/"
"""How the names of metrics begin that are the means of a reward's parts."""
CAUSES = {
    "masked": "every token was masked",
    "learning_rate": "the learning rate was 0, as in the first step of a warm-up",
    "zero_advantages": "every advantage was 0: in each group all rewards were equal",
    "clipped": "every token with an advantage was clipped",
    "no_gradient": "the loss had no gradient: a correction, a reducer or the loss itself left no token",
    "lost": "the loss had a gradient that did not reach the weights: frozen parameters, or an underflow",
}
"""Why an optimizer step changed nothing, by the last part of the metric's name."""

_ROLLOUT = {
    "reward": "Mean reward of the rollout's samples, before it is normalised.",
    "rm_seconds": "Mean time in which --rm-url scored one sample, with all attempts.",
    "rm_retries": "Requests to --rm-url that were sent again.",
    "rm_timeouts": "Answers that a grading process had no verdict on within --rm-timeout.",
    "rm_deaths": "Grading processes that died, or wanted more memory than they may have.",
    "rm_errors": "Answers on which a grader raised.",
    "response_length": "Mean length of a response, tool output included, in tokens.",
    "response_length_max": "The longest response, in tokens.",
    "tokens": "Response tokens of all samples.",
    "samples": "Samples that the rollout brought.",
    "truncated": "Share of responses that were cut off at their longest allowed length.",
    "offpolicy_masked_tokens": "Response tokens that older weights generated, left out of the loss.",
    "removed": "Share of samples that stay in the batch and are not trained on.",
    "equal_groups": "Share of groups whose rewards are all the same. Where rewards are compared within groups, their "
    "advantages are 0 and they teach nothing, unless a critic, whitening over the rollout, a KL penalty, an entropy "
    "bonus or a teacher adds something.",
}
_TRAIN = {
    "loss": "What the policy's gradient is of: mean over the step's samples or tokens, all parts added.",
    "pg_loss": "The policy-gradient part of the loss.",
    "pg_clipfrac": "Share of tokens whose loss clipping decides. Near 0 the clip does nothing, far up most of the data "
    "is without effect.",
    "ppo_kl": "Mean of old less current log-probs: how far the steps of one rollout have moved the policy (KL, k1).",
    "ratio_max": "The largest importance ratio, current over old probability, of a token; with gspo of a response.",
    "entropy": "Mean entropy of the policy at response tokens, in nats. Near 0 it has stopped exploring.",
    "kl_loss": "Mean KL divergence from the reference model, estimated as --kl-loss-type says, before its weight "
    "--kl-loss-coef.",
    "kl_reward": "Mean KL divergence from the reference model that rewards lose --kl-coef times of.",
    "opd_kl": "Mean of old less teacher log-prob on the policy's own tokens: how far it still is from the teacher.",
    "value_loss": "Loss of the critic: half the squared distance of its values from the returns, clipped.",
    "value_clipfrac": "Share of tokens whose value moved beyond --value-clip and no longer pulls.",
    "explained_variance": "1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that says the "
    "same everywhere, below 0 for one that harms.",
    "critic_grad_norm": "Norm of the critic's gradient before clipping, mean over steps.",
    "critic_lr": "Learning rate of the critic, mean over steps.",
    "grad_norm": "Norm of the gradient before clipping, mean over the steps that ran.",
    "lr": "Learning rate, mean over the steps that ran.",
    "tokens": "Tokens that went through forward and backward, prompts included: of the policy, or of the critic in "
    "rollouts that train it alone.",
    "micro_batches": "Micro-batches of all steps and ranks.",
    "padding_share": "Share of what attention computed that held no token.",
    "micro_batch_fill": "How full micro-batches were in the mean, as a share of --max-tokens-per-gpu; above 1 where "
    "one sample is longer.",
    "dp_imbalance": "By how much the busiest data-parallel rank's work exceeds the mean, as a share of it: the others "
    "wait for it.",
    "samples_skipped": "Samples left out of the passes because their advantages are all 0 (--skip-zero-advantage).",
    "skipped_steps": "Optimizer steps that were not taken because every sample was left out.",
    "zero_gradient_steps": "Optimizer steps that could not change the weights: skipped, gradient norm 0, or learning "
    "rate 0.",
    "logprob_gap_mean": "Mean distance, in nats, between trainer's and engine's log-prob of a sampled token, in "
    "every rollout that runs the policy.",
    "logprob_gap_max": "Largest distance, in nats, between trainer's and engine's log-prob of a sampled token.",
    "mismatch_k1": "KL divergence of the trainer's policy from the engine's: mean of engine less trainer log-prob. "
    "Noisy, may be negative.",
    "mismatch_k3": "The same KL divergence as the mean of w - 1 - log w, with w the trainer's over the engine's "
    "probability: never negative, less noisy.",
    "mismatch_ess": "Effective sample size, as a share, of tokens weighted by w, the trainer's over the engine's "
    "probability: 1 where both agree; 0.5 says that half the data would be lost to the correction.",
    "mismatch_ess_samples": "The same of whole responses, weighted by the product of w over their tokens.",
    "tis": "Mean importance weight, trainer's over engine's probability, before it is cut off.",
    "tis_clipfrac": "Share of tokens whose importance weight was cut off.",
    "tis_abs": "Mean distance of the importance weight from 1.",
}
_EVAL = {
    "reward": "Mean reward of the evaluation's responses.",
    "truncated": "Share of the evaluation's responses that were cut off at their longest allowed length.",
    "response_length": "Mean length of the evaluation's responses, in tokens.",
}
_HOOKS = {
    "calls": "Calls of this hook since the last rollout.",
    "seconds": "Seconds spent in this hook since the last rollout, over all its concurrent calls.",
    "errors": "Calls of this hook that raised, or returned what they may not, since the last rollout.",
    "timeouts": "Calls of this hook that reached their deadline since the last rollout.",
    "retries": "Calls of this hook that were tried again since the last rollout.",
}
_SYNC = {
    "checked": "Engines whose weights were compared with the trainer's after this push.",
    "checked_tensors": "Tensors of each engine whose hash was compared with the trainer's.",
    "probe_gap_max": "Largest distance, in nats, between trainer's and engine's log-probs of fixed probe sequences.",
    "probe_gap_mean": "Mean distance, in nats, between trainer's and engine's log-probs of fixed probe sequences.",
}
_WORDS = {
    f"{stage}/{name}": words
    for stage, table in {"rollout": _ROLLOUT, "train": _TRAIN, "eval": _EVAL, "hooks": _HOOKS, "sync": _SYNC}.items()
    for name, words in table.items()
} | {
    "engines/restarts": "Engines that died and were replaced since the last rollout.",
    "router/restarts": "How often the router died and was replaced since the last rollout.",
}
_OF_SOMETHING = re.compile(r"(eval|hooks)/.+/([^/]+)")


def explain(name: str) -> str:
    """Return what a metric of `metrics.jsonl` says; empty for a name that is not ours, such as one that a hook gave."""
    if name.startswith("rollout/dropped/"):
        return f"Groups that were dropped for the reason {name.removeprefix('rollout/dropped/')}."
    part = re.fullmatch(r"(?:rollout|eval/.+?)/reward/(.+)", name)
    if part:
        return f"Mean of the part {part[1]} of the samples' rewards, before any weight."
    cause = name.removeprefix(CAUSE)
    if cause in CAUSES:
        return f"Optimizer steps that could not change the weights because {CAUSES[cause]}."
    return _WORDS.get(_OF_SOMETHING.sub(r"\1/\2", name), "")


def unsaid(metrics: Mapping[str, float], told: set[str]) -> list[str]:
    """Return in words why steps of a rollout changed nothing, for causes that are not among those `told`; adds them."""
    new = [cause for cause in CAUSES if metrics.get(CAUSE + cause) and cause not in told]
    told.update(new)
    return [
        f"{counted(round(metrics[CAUSE + cause]), 'optimizer step')} changed nothing: {CAUSES[cause]} "
        "(train/zero_gradient_steps counts them; this is said once)"
        for cause in new
    ]
