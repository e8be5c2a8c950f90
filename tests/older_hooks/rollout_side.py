"""Hooks of the rollout process as they are written for Miles 0.x and slime: one of each kind."""

import copy

from miles.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.rollout.filter_hub.base_types import DynamicFilterOutput
from miles.utils.misc import SingletonMeta
from slime.rollout.data_source import DataSource, RolloutDataSourceWithBuffer, pop_first
from slime.rollout.rm_hub import async_rm, grade_answer_verl
from slime.rollout.rm_hub.math_dapo_utils import compute_score
from slime.rollout.sglang_rollout import GenerateState, get_model_url
from slime.utils.http_utils import get, post
from slime.utils.metric_utils import compute_statistics, dict_add_prefix
from slime.utils.processing_utils import load_tokenizer
from slime.utils.types import Sample


def generate_rollout(args, rollout_id, data_buffer, *, evaluation=False):
    if evaluation:
        return RolloutFnEvalOutput({"held_out": {"rewards": [1.0], "truncated": [False], "samples": [Sample(index=0)]}})
    return RolloutFnTrainOutput(samples=data_buffer.get_samples(2), metrics=None)


async def generate(args, sample: Sample, sampling_params, evaluation=False) -> list[Sample]:
    state = GenerateState(args)
    answer = await post(get_model_url(args, "default"), {"text": sample.prompt, "sampling_params": sampling_params})
    twin = copy.copy(sample)
    twin.append_response_tokens(
        args, tokens=state.tokenizer.encode(answer["text"]), log_probs=None, trainable=False, text=answer["text"]
    )
    twin.status = Sample.Status.COMPLETED
    return [twin]


async def reward(args, sample, **kwargs):
    if isinstance(sample, list):
        return [await reward(args, one) for one in sample]
    return max(compute_score(sample.response, sample.label)["score"], float(grade_answer_verl(sample.response, "1")))


def post_process_rewards(args, samples, **kwargs):
    raw = [sample.get_reward_value(args) for sample in samples]
    return raw, [value - 0.5 for value in raw]


def check_group(args, samples: list[Sample], **kwargs) -> DynamicFilterOutput:
    keep = any(sample.status != Sample.Status.ABORTED for sample in samples)
    return DynamicFilterOutput(keep, None if keep else "aborted")


def newest_first(args, rollout_id, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    buffer.reverse()
    return pop_first(args, rollout_id, buffer, num_samples)


def leave_out_short(args, data: list[list[Sample]]) -> None:
    for group in data:
        for sample in group:
            sample.remove_sample = sample.response_length < 2


def look_at_all(args, all_samples, data_source) -> None:
    args.seen = len(all_samples)


def convert(args, samples, raw, normalised):
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": normalised,
        "raw_reward": raw,
        "truncated": [int(sample.status == Sample.Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [sample.loss_mask or [1] * sample.response_length for sample in samples],
    }


def log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    lengths = compute_statistics([sample.effective_response_length for sample in samples])
    args.logged = {**(rollout_extra_metrics or {}), **dict_add_prefix(lengths, "rollout/response_len/")}
    return True


def log_eval(rollout_id, args, data, extra_metrics):
    return False


class Source(DataSource):
    def __init__(self, args):
        self.args, self.inner = args, RolloutDataSourceWithBuffer

    def get_samples(self, num_samples):
        return [[Sample(group_index=i, index=i)] for i in range(num_samples)]

    def save(self, rollout_id): ...

    def load(self, rollout_id=None): ...


async def run_agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    return {"prompt": prompt, "turns": 1}


async def abort(args): ...


async def execute_tool(name, params):
    return f"{name} {sorted(params)}"


tool_specs = [{"type": "function", "function": {"name": "search", "parameters": {}}}]


class Middleware:
    def __init__(self, app, *, router):
        self.app, self.router = app, router

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


class Counter(metaclass=SingletonMeta):
    pass


__all__ = ["async_rm", "get", "load_tokenizer"]
