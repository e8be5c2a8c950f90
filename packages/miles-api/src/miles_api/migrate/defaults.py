"""Where Miles 0.x and slime do otherwise than we do when a launch script says nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from miles_api.migrate.objective import reads_kl, whitens_only_here
from miles_api.migrate.verdicts import Flags

__all__ = ["DEFAULTS", "Default"]


class Default(msgspec.Struct):
    """A value that the older stack takes where the script says nothing, and ours does not."""

    flag: str
    key: str
    value: Any
    """As words on a command line, or the value itself."""
    remark: str
    like: str = ""
    """The flag whose value it is, where the script gives that."""
    beside: str = ""
    """Only where the script gives this flag."""
    applies: Callable[[Flags], bool] = lambda _flags: True
    """Only where this is so of the script's flags."""


DEFAULTS = [
    Default("--input-key", "input_key", ["input"], "the default there"),
    Default("--n-samples-per-prompt", "n_samples_per_prompt", ["1"], "the default there"),
    Default("--actor-num-gpus-per-node", "actor_num_gpus_per_node", ["8"], "the default there"),
    Default("--rollout-skip-special-tokens", "rollout_skip_special_tokens", False, "the default there"),
    Default("--weight-decay", "weight_decay", ["0.01"], "Megatron-LM's default"),
    Default("--tool-key", "tool_key", ["tools"], "the default there", beside="--apply-chat-template"),
    Default("--adam-beta2", "adam_beta2", ["0.999"], "Megatron-LM's default"),
    Default("--eval-temperature", "eval_temperature", ["1"], "as in training", "--rollout-temperature",
            "--eval-prompt-data"),
    Default("--eval-top-p", "eval_top_p", ["1"], "as in training", "--rollout-top-p", "--eval-prompt-data"),
    Default("--use-dynamic-batch-size", "use_dynamic_batch_size", False, "the default there",
            beside="--micro-batch-size"),
    Default("--kl-loss-type", "kl_loss_type", ["k1"], "the default there", applies=reads_kl),
    Default("--normalize-advantages", "normalize_advantages", False, "the default there", applies=whitens_only_here),
]  # fmt: skip
