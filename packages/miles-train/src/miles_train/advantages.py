"""Advantages of response tokens from rewards."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["grpo_advantages"]


def grpo_advantages(rollout_data: dict[str, Any]) -> None:
    """Set `advantages` and `returns`: every response token of a sample gets the sample's reward (arXiv 2402.03300).

    Called once a rollout on each rank, after log-probs. `rewards` are already normalised within their groups by the
    rollout's reward post-processing, which alone sees whole groups. Both columns are lists of 1-D fp32 tensors of the
    response's length; masked tokens carry a value too, and the reducer leaves them out.
    """
    masks = rollout_data["loss_masks"]
    lengths = [len(mask) for mask in masks]
    rewards = torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=masks[0].device)
    counts = torch.tensor(lengths, device=rewards.device)
    advantages = rewards.repeat_interleave(counts, output_size=sum(lengths))
    rollout_data["advantages"] = list(advantages.split(lengths))
    rollout_data["returns"] = list(advantages.split(lengths))
