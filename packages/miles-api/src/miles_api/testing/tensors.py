"""What trainer ranks hand to hooks, for those who have torch: columns as tensors, logits, a reducer."""

# ruff: noqa: N803, N806  the shape suffixes
# R response tokens of the micro-batch, T packed tokens, V vocabulary

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from miles_api.testing.result import ConformanceSkip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_api.testing.trial import Trial

__all__ = ["VOCABULARY", "clone", "log_probs_of", "logits_of", "parallel", "reducer", "rollout_data", "the_torch"]

VOCABULARY = 16
_SHAPES = (
    (3, [1, 1, 1, 1]),
    (5, [0, 0]),
    (4, []),
    (2, [1, 1, 0, 0, 1, 1]),
    (6, [1]),
)
"""Prompt length and loss mask of each sample: one is masked throughout, one is empty, one has a tool's output."""


def the_torch(trial: Trial) -> Any:
    """Return torch, or raise `ConformanceSkip`: miles-api itself does without."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        name = f"{trial.hook.spec.name} hook {trial.hook.reference}"
        raise ConformanceSkip(f"{name} fits, and was not called: torch is not installed") from error


def rollout_data(torch: Any, keep: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the columns of some samples as a trainer rank has them, log-probs and advantages included."""
    generator = torch.Generator().manual_seed(0)
    chosen = range(len(_SHAPES)) if keep is None else keep
    prompts, masks = [_SHAPES[i][0] for i in chosen], [_SHAPES[i][1] for i in chosen]
    lengths = [len(mask) for mask in masks]
    totals = [prompt + length for prompt, length in zip(prompts, lengths, strict=True)]
    rewards = [(-1.0) ** i for i in chosen]

    def log_probs() -> list[Any]:
        return [-torch.rand(length, generator=generator) - 0.1 for length in lengths]

    return {
        "tokens": [torch.randint(0, VOCABULARY, (total,), generator=generator) for total in totals],
        "response_lengths": lengths, "total_lengths": totals,
        "loss_masks": [torch.tensor(mask, dtype=torch.float32) for mask in masks],
        "rewards": rewards, "raw_reward": [float(reward > 0) for reward in rewards],
        "truncated": [0] * len(masks), "sample_indices": list(chosen), "rollout_ids": list(chosen),
        "group_indices": [i // 2 for i in chosen], "weight_versions": [["1"]] * len(masks),
        "rollout_log_probs": log_probs(), "log_probs": log_probs(),
        "advantages": [torch.full((length,), reward) for length, reward in zip(lengths, rewards, strict=True)],
        "returns": [torch.full((length,), reward) for length, reward in zip(lengths, rewards, strict=True)],
    }  # fmt: skip


def clone(torch: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Return a copy whose tensors are its own."""
    return {
        name: [value.clone() if isinstance(value, torch.Tensor) else value for value in column]
        for name, column in data.items()
    }


def logits_of(torch: Any, batch: dict[str, Any]) -> Any:
    """Return logits of the packed sequences, shape (T, V), a leaf that wants a gradient."""
    size = (sum(batch["total_lengths"]), VOCABULARY)
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).requires_grad_()


def log_probs_of(torch: Any, batch: dict[str, Any], temperature: float) -> Any:
    """Return the `log_probs_and_entropy` of a micro-batch."""

    def log_probs_and_entropy(logits: Any, entropy: bool = False) -> tuple[list[Any], list[Any] | None]:
        log_probs, entropies, end = [], [], 0
        for tokens, length in zip(batch["tokens"], batch["response_lengths"], strict=True):
            end += len(tokens)
            logs = torch.log_softmax(logits[end - length - 1 : end - 1] / temperature, -1)
            log_probs.append(logs.gather(-1, tokens[len(tokens) - length :, None]).squeeze(-1))
            entropies.append(-(logs.exp() * logs).sum(-1))
        return log_probs, entropies if entropy else None

    return log_probs_and_entropy


def reducer(torch: Any, batch: dict[str, Any], per_token: bool) -> Any:
    """Return the default reducer of a micro-batch: a sum of sample means, or of tokens."""
    masks = batch["loss_masks"]
    sizes = [1.0 if per_token else max(float(mask.sum()), 1.0) for mask in masks]
    weights_R = torch.cat([mask / size for mask, size in zip(masks, sizes, strict=True)])
    return lambda values_R: (values_R * weights_R).sum()


def parallel() -> SimpleNamespace:
    """Return the place of a rank that is alone."""
    one = SimpleNamespace(size=1, rank=0, group=None)
    return SimpleNamespace(tp=one, pp=one, cp=one, dp=one)
