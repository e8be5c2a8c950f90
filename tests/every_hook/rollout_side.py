"""Every hook of the rollout process: each notes what it saw, and changes something that can be measured."""

from notes import saw

from miles_api import (
    Args,
    DynamicFilterOutput,
    GenerateFnInput,
    GenerateFnOutput,
    Sample,
)
from miles_rollout.convert import convert_samples
from miles_rollout.data_source import RolloutDataSourceWithBuffer
from miles_rollout.generate.agentic import Agentic
from miles_rollout.loop import InferenceRollout


class Rollout(InferenceRollout):
    """Replaces the loop by itself, so that the hooks it calls fire too."""

    async def __call__(self, input):
        output = await super().__call__(input)
        saw("rollout", input=type(input).__name__, version=input.weight_version)
        output.metrics["rollout/mine"] = 7.0
        return output


def eval_rollout(args, rollout_id, data_source, evaluation=True):
    """Returns a bare dict, which is wrapped."""
    saw("eval_rollout", evaluation=evaluation, rollout_id=rollout_id, source=type(data_source).__name__)
    sample = Sample(prompt="p", response="r", tokens=[1, 2], response_length=1, reward=0.25)
    return {"mine": {"rewards": [0.25], "truncated": [False], "samples": [sample]}}


class Source(RolloutDataSourceWithBuffer):
    """The default one; its checkpoints say where they were written."""

    def save(self, rollout_id):
        saw("data_source.save", rollout_id=rollout_id, save=str(self._args.save))
        super().save(rollout_id)


def buffer_filter(args, rollout_id, buffer, num_samples):
    """Newest first."""
    taken = [buffer.pop() for _ in range(min(num_samples, len(buffer)))]
    saw("buffer_filter", taken=[group[0].group_index for group in taken])
    return taken


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Has the agent converse, and says so."""
    output = await _AGENTIC(input)
    output.samples.metadata["mine"] = True
    saw(
        "generate",
        evaluation=input.evaluation,
        keys=sorted(input.sampling_params),
        turns=output.samples.metadata["turns"],
    )
    return output


_AGENTIC = Agentic()


def reward(args: Args, sample: Sample) -> float:
    saw("reward", index=sample.index, mask=sum(sample.loss_mask or []), tokens=sample.response_length)
    return float(sample.index % 3)


async def group_reward(args, samples):
    saw("group_reward", size=len(samples))
    return [{"half": 0.5 * position, "one": 1.0} for position in range(len(samples))]


def reward_post_process(args, samples):
    """Not normalised: rewards of 2 and more are told apart from the default's."""
    raw = [sample.get_reward_value(args) for sample in samples]
    saw("reward_post_process", samples=len(samples))
    return raw, [value + 2.0 for value in raw]


_DROPPED = []


def first_filter(args, samples, **kwargs):
    """Drops the first group that it sees."""
    keep = bool(_DROPPED)
    _DROPPED.append(samples[0].group_index)
    saw("dynamic_filter", group=samples[0].group_index, scored=[s.reward is not None for s in samples])
    return DynamicFilterOutput(keep=keep, reason="the_first")


def second_filter(args, samples):
    saw("dynamic_filter_second", group=samples[0].group_index)
    return True


def sample_filter(args, data):
    """Takes the first sample of each group out of the loss."""
    for group in data:
        group[0].remove_sample = True
    saw("sample_filter", removed=[group[0].index for group in data])


def all_samples_process(args, all_samples, data_source):
    saw(
        "all_samples_process",
        groups=[group[0].group_index for group in all_samples],
        buffer=data_source.get_buffer_length(),
    )


def convert(args, samples, *, raw_rewards, rewards):
    """Adds a column of its own."""
    saw("convert_samples", rewards=rewards, order=[(s.group_index, s.index) for s in samples])
    return {
        **convert_samples(args, samples, raw_rewards=raw_rewards, rewards=rewards),
        "mine": [s.index for s in samples],
    }


def rollout_log(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    saw("rollout_log", rollout_id=rollout_id, samples=len(samples), metrics=rollout_extra_metrics, time=rollout_time)
    return True


def eval_rollout_log(rollout_id, args, data, extra_metrics):
    saw("eval_rollout_log", rollout_id=rollout_id, rewards=data["mine"]["rewards"])
    return True
