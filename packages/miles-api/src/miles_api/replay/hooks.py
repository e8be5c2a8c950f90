"""Which hooks can be replayed on recorded rollouts, and why the others cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.replay.conversion import ConvertReplayer, PostProcessReplayer
from miles_api.replay.filters import AllSamplesReplayer, DynamicFilterReplayer, SampleFilterReplayer
from miles_api.replay.scores import GroupRewardReplayer, RewardReplayer

if TYPE_CHECKING:
    from miles_api.replay.replayer import Replayer

__all__ = ["REFUSED", "REPLAYERS"]

REPLAYERS: dict[str, type[Replayer]] = {
    "reward": RewardReplayer,
    "group_reward": GroupRewardReplayer,
    "reward_post_process": PostProcessReplayer,
    "dynamic_filter": DynamicFilterReplayer,
    "sample_filter": SampleFilterReplayer,
    "all_samples_process": AllSamplesReplayer,
    "convert_samples": ConvertReplayer,
}

_GENERATES = "it generates, which needs an engine, and what it generates differs from call to call"
_MEGATRON = "it needs the model that is being trained, which a dump does not hold"
_LOGS = "it reports to the outside, and a replay would report it again"
REFUSED: dict[str, str] = {
    "rollout": _GENERATES,
    "generate": _GENERATES,
    "eval_rollout": _GENERATES,
    "agent": _GENERATES,
    "agent_abort": _GENERATES,
    "execute_tool": "it acts on the world outside, and a dump does not say with which arguments it was called",
    "tool_specs": "it is a value: nothing calls it",
    "data_source": "it makes the prompts, and a dump holds what came of them",
    "buffer_filter": "a dump does not hold the buffer that it picks from",
    "router_middleware": "a dump holds no requests",
    "loss": "it needs the logits of a model, which a recorded batch does not hold",
    "model_provider": _MEGATRON,
    "megatron_init": _MEGATRON,
    "before_log_prob": _MEGATRON,
    "before_train_step": _MEGATRON,
    "post_save": "it acts on a checkpoint, which a dump does not hold",
    "rollout_log": _LOGS,
    "eval_rollout_log": _LOGS,
}
