"""Options of Miles 0.x and slime that hooks read and this build lacks, with the one value that is true of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OLDER_OPTIONS", "older_option"]

OLDER_OPTIONS: dict[str, Any] = {
    "ci_test": False,
    "dump_details": None,
    "mask_offpolicy_in_partial_rollout": False,
    "multimodal_keys": None,
    "kl_loss_coef": 0.0,
    "rm_url": None,
    "chat_template_path": None,
    "eval_max_context_len": None,
    "partial_rollout": False,
    "qkv_format": "thd",
    "rollout_global_dataset": True,
    "rollout_num_gpus_per_engine": 1,
    "sglang_dp_size": 1,
    "sglang_enable_deterministic_inference": False,
    "sglang_router_policy": None,
    "sglang_speculative_algorithm": None,
    "use_kl_loss": False,
    "use_miles_router": False,
    "use_opsm": False,
    "use_rollout_routing_replay": False,
    "use_slime_router": False,
}
"""Read only where the run has no option of that name; immutable values."""

_RENAMED = {"rollout_num_gpus": "rollout_num_engines"}


def older_option(name: str, options: Mapping[str, Any]) -> Any:
    """Return what an older option is here; raises `KeyError` for a name that is none."""
    return options[_RENAMED[name]] if name in _RENAMED else OLDER_OPTIONS[name]
