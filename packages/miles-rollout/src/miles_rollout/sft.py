"""The rollout of supervised training: prompt and label become prompt and response; no engine is asked."""

from __future__ import annotations

from miles_api.errors import DataError
from miles_api.rollout_types import RolloutFnConstructorInput, RolloutFnTrainInput, RolloutFnTrainOutput
from miles_api.sample import Sample, Status
from miles_rollout.tokenizers import encode, load_prompt_tokenizer

__all__ = ["SftRollout"]


class SftRollout:
    """Read `--rollout-batch-size` prompts and take their labels as responses, ended by the end-of-text token."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        self._args = input.args
        self._data_source = input.data_source
        self._tokenizer = load_prompt_tokenizer(input.args.hf_checkpoint)

    def __call__(self, input: RolloutFnTrainInput) -> RolloutFnTrainOutput:  # noqa: A002
        groups = self._data_source.get_samples(self._args.rollout_batch_size)
        for group in groups:
            for sample in group:
                self._fill(sample)
        return RolloutFnTrainOutput(samples=groups)

    def _fill(self, sample: Sample) -> None:
        if not isinstance(sample.label, str):
            raise DataError(f"sample {sample.index}: supervised training needs a text label, got {sample.label!r}")
        ending = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        response = [*encode(self._tokenizer, sample.label), *ending]
        sample.tokens = [*encode(self._tokenizer, str(sample.prompt)), *response]
        sample.response_length = len(response)
        sample.response = sample.label
        sample.reward = 0.0
        sample.status = Status.COMPLETED
