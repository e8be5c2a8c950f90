"""Evaluation on held-out prompts, through the same generation and scoring as training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError
from miles_api.options import options_from
from miles_api.rollout_types import Group, RolloutFnEvalOutput
from miles_api.sample import Sample, Status
from miles_rollout.group import flatten, gather, run_group
from miles_rollout.jsonl import read_prompts
from miles_rollout.options import DataOptions, EvalOptions

if TYPE_CHECKING:
    from miles_rollout.state import State

__all__ = ["eval_metrics", "evaluate"]


async def evaluate(state: State) -> RolloutFnEvalOutput:
    """Generate and score `--n-samples-per-eval-prompt` samples for each held-out prompt."""
    options: EvalOptions = options_from(state.args, EvalOptions)
    if options.eval_prompt_data is None:
        raise ConfigError("--eval-interval needs --eval-prompt-data")
    groups = _groups(state, options)
    finished = await gather(*(run_group(state, group, evaluation=True) for group in groups))
    samples = flatten(finished)
    view = state.args.fork()
    view.reward_key = state.rewards.eval_reward_key or state.rewards.reward_key
    data = {
        "rewards": [sample.get_reward_value(view) for sample in samples],
        "truncated": [s.status == Status.TRUNCATED for s in samples],
        "samples": samples,
    }
    return RolloutFnEvalOutput(data={Path(options.eval_prompt_data).stem: data})


def _groups(state: State, options: EvalOptions) -> list[Group]:
    prompts = read_prompts(str(options.eval_prompt_data), options_from(state.args, DataOptions), state.tokenizer)
    n = options.n_samples_per_eval_prompt
    return [
        [
            Sample(
                group_index=number, index=number * n + i, prompt=prompt.prompt, label=prompt.label,
                metadata=dict(prompt.metadata),
            )
            for i in range(n)
        ]
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip


def eval_metrics(data: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return mean reward, truncated share and mean response length of each dataset."""
    metrics: dict[str, float] = {}
    for name, part in data.items():
        samples: list[Sample] = part["samples"]
        size = max(len(samples), 1)
        metrics[f"eval/{name}/reward"] = sum(part["rewards"]) / size
        metrics[f"eval/{name}/truncated"] = sum(part["truncated"]) / size
        metrics[f"eval/{name}/response_length"] = sum(s.response_length for s in samples) / size
    return metrics
