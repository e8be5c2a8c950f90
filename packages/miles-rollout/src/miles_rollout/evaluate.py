"""Evaluation on held-out prompts, through the same generation and scoring as training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError, HookResultError, counted
from miles_api.loading.plain import plain_number
from miles_api.options import options_from
from miles_api.rollout_types import Group, RolloutFnEvalOutput, flatten
from miles_api.sample import Sample, Status
from miles_rollout.failures import HookFailed
from miles_rollout.group import gather, run_group
from miles_rollout.jsonl import read_prompts, takes_messages
from miles_rollout.metrics import reward_parts
from miles_rollout.options import DataOptions, EvalOptions
from miles_rollout.pristine import copied, copy_group

if TYPE_CHECKING:
    from miles_rollout.state import State

__all__ = ["checked_evaluation", "eval_metrics", "evaluate"]


async def evaluate(state: State) -> RolloutFnEvalOutput:
    """Generate and score `--n-samples-per-eval-prompt` samples for each held-out prompt.

    A sample that a hook fails on is counted and left out, never scored 0; when none is left the run stops.
    """
    options: EvalOptions = options_from(state.args, EvalOptions)
    if options.eval_prompt_data is None:
        raise ConfigError("--eval-interval needs --eval-prompt-data")
    groups = _groups(state, options)
    if not state.scores_groups(evaluation=True):
        groups = [[sample] for group in groups for sample in group]
    results = await gather(*(_one(state, group) for group in groups))
    finished = [group for group in results if not isinstance(group, HookFailed)]
    failures = [failure for failure in results if isinstance(failure, HookFailed)]
    if failures and not finished:
        state.guard.stop(failures[0], f"all {len(failures)} evaluations failed")
    samples = flatten(finished)
    name = Path(options.eval_prompt_data).stem
    lost = sum(map(len, groups)) - sum(map(len, finished))
    if lost:
        print(
            f"warning: {counted(lost, 'sample')} of eval/{name} left out, on which hooks failed: {failures[0].error!r}"
        )
    view = state.args.fork()
    view.reward_key = state.rewards.eval_reward_key or state.rewards.reward_key
    data = {
        "rewards": [sample.get_reward_value(view) for sample in samples],
        "truncated": [s.status == Status.TRUNCATED for s in samples],
        "samples": samples,
    }
    metrics = {f"eval/{name}/hook_errors": float(lost)} if lost else {}
    return RolloutFnEvalOutput(data={name: data}, metrics=metrics | state.hook_metrics())


async def _one(state: State, group: Group) -> Group | HookFailed:
    try:
        return await run_group(state, group, copy_group(group) if state.shows(group) else None, evaluation=True)
    except HookFailed as failure:
        return failure


def _groups(state: State, options: EvalOptions) -> list[Group]:
    data: DataOptions = options_from(state.args, DataOptions)
    path = str(options.eval_prompt_data)
    prompts = read_prompts(path, data, state.prompt_tokenizer, messages=takes_messages(state.args))
    n = options.n_samples_per_eval_prompt
    return [
        [
            Sample(
                group_index=number, index=number * n + i, prompt=copied(prompt.prompt), label=copied(prompt.label),
                metadata=copied(prompt.metadata),
            )
            for i in range(n)
        ]
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip


def checked_evaluation(output: Any, who: str) -> RolloutFnEvalOutput:
    """Return what an evaluation hook returned, a bare dict wrapped; each dataset needs rewards, truncated, samples."""
    if isinstance(output, dict):
        output = RolloutFnEvalOutput(data=output)
    if not isinstance(output, RolloutFnEvalOutput):
        raise HookResultError(f"{who} returned {type(output).__name__}, not RolloutFnEvalOutput")
    for name, part in output.data.items():
        lacking = [key for key in ("rewards", "truncated", "samples") if key not in part]
        if lacking:
            raise HookResultError(f"{who} returned the dataset {name!r} without {', '.join(lacking)}")
        part["rewards"] = [
            plain_number(value, who, f"reward {number} of {name}") for number, value in enumerate(part["rewards"])
        ]
    return output


def eval_metrics(data: dict[str, dict[str, Any]], key: str | None = None) -> dict[str, float]:
    """Return mean reward, truncated share and mean response length of each dataset, and the means of reward parts.

    `key` is the entry of a dict reward that is the reward.
    """
    metrics: dict[str, float] = {}
    for name, part in data.items():
        samples: list[Sample] = part["samples"]
        size = max(len(samples), 1)
        metrics[f"eval/{name}/reward"] = sum(part["rewards"]) / size
        metrics |= {f"eval/{name}/reward/{part}": mean for part, mean in reward_parts(samples, key).items()}
        metrics[f"eval/{name}/truncated"] = sum(part["truncated"]) / size
        metrics[f"eval/{name}/response_length"] = sum(s.response_length for s in samples) / size
    return metrics
