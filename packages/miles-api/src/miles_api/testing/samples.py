"""Samples, groups and rollouts of every shape that a run produces."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError
from miles_api.sample import Sample, Status
from miles_api.testing.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_api.rollout_types import Group

__all__ = ["Maker", "make_group", "make_prompt", "make_sample", "text_of"]

_PROMPT = "What is 3 + 4? Answer with a number."
_LABEL = "7"
_ANSWERS = ("7", "12", "It is 7.", "I do not know.")
_LOG_PROB = -0.25
_TOKENIZER = ByteTokenizer()


def make_sample(**fields: Any) -> Sample:
    """Make a finished, unscored sample: a sum as prompt, its result as label, an answer with tokens and log-probs.

    Every field can be given; tokens follow the prompt and the response, log-probs the response's length.
    """
    prompt, response = fields.get("prompt", _PROMPT), fields.get("response", _LABEL)
    given_tokens = fields.get("tokens")
    answer = [*_TOKENIZER.encode(response), _TOKENIZER.eos_token_id] if response else []
    if given_tokens is None:
        fields = {**fields, "tokens": [*_TOKENIZER.encode(text_of(prompt)), *answer]}
        fields.setdefault("response_length", len(answer))
    elif "response_length" not in fields:
        raise ConfigError("make_sample: tokens need a response_length: how many of the last ones are the response")
    usual: dict[str, Any] = {
        "group_index": 0, "index": 0, "rollout_id": 0, "prompt": prompt, "response": response, "label": _LABEL,
        "rollout_log_probs": [_LOG_PROB] * fields["response_length"], "status": Status.COMPLETED,
        "weight_versions": ["1"],
    }  # fmt: skip
    return Sample(**{**usual, **fields})


def make_prompt(**fields: Any) -> Sample:
    """Make a pending sample, as a data source hands it out: prompt, label, identity and nothing generated."""
    usual: dict[str, Any] = {"group_index": 0, "index": 0, "rollout_id": 0, "prompt": _PROMPT, "label": _LABEL}
    return Sample(**{**usual, **fields})


def make_group(size: int = 3, group_index: int = 0, **fields: Any) -> list[Sample]:
    """Make the finished samples of one prompt, right and wrong answers in turn."""
    return [
        make_sample(
            **{
                "group_index": group_index, "index": group_index * size + i, "rollout_id": group_index * size + i,
                "response": _ANSWERS[i % len(_ANSWERS)], **fields,
            }
        )
        for i in range(size)
    ]  # fmt: skip


def text_of(prompt: Any) -> str:
    """Return a prompt as text: chat messages one a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


class Maker:
    """Makes the inputs of one check, from the author's own samples where there are some.

    Indices never repeat, so that samples of different groups can be told apart.
    """

    def __init__(self, samples: Sequence[Sample] | None = None, reward_key: str | None = None) -> None:
        if samples is not None and not samples:
            raise ConfigError("samples is empty: give some, or leave it out")
        self._own = samples
        self._key = reward_key
        self._made = 0
        self._groups = 0

    def prompts(self, count: int, size: int) -> list[list[Sample]]:
        """Return groups of pending samples."""
        return [self._group(size, pending=True) for _ in range(count)]

    def group(self, size: int) -> list[Sample]:
        """Return one group of finished, unscored samples."""
        return self._group(size)

    def scored(self, *rewards: float, **fields: Any) -> list[Sample]:
        """Return one group with a sample for each reward; a dict of rewards where the options name a key."""
        group = self._group(len(rewards), **fields)
        for sample, reward in zip(group, rewards, strict=True):
            sample.reward = {self._key: reward, "other": 0.5} if self._key else reward
        return group

    def rollout(self) -> list[Group]:
        """Return the groups of one scored rollout: ragged, of one, fanned out; truncated, empty and removed samples."""
        even, ragged, alone, fanned = (
            self.scored(*rewards) for rewards in ((1.0, 0.0, 1.0), (0.0, 0.0), (1.0,), (1.0, 0.0, 0.5))
        )
        if self._own is None:
            ragged[1].status = Status.TRUNCATED
            even[2] = self._emptied(even[2])
            fanned[1].loss_mask = [0] + [1] * (fanned[1].response_length - 1)
        alone[0].remove_sample = True
        fanned[1].rollout_id = fanned[0].rollout_id
        return [[*even], [*ragged], [*alone], [fanned[:2], fanned[2]]]

    def empty(self) -> Sample:
        """Return a finished sample without a response, as the engine gives it when nothing more fits."""
        return self._emptied(self._group(1)[0])

    def truncated(self) -> Sample:
        """Return a finished sample that was cut at the length limit."""
        sample = self._group(1)[0]
        sample.status = Status.TRUNCATED
        return sample

    @staticmethod
    def _emptied(sample: Sample) -> Sample:
        prompt = sample.tokens[: len(sample.tokens) - sample.response_length]
        sample.tokens, sample.response, sample.response_length = prompt, "", 0
        sample.rollout_log_probs, sample.loss_mask, sample.status = [], None, Status.TRUNCATED
        sample.teacher_log_probs = None if sample.teacher_log_probs is None else []
        return sample

    def _group(self, size: int, *, pending: bool = False, **fields: Any) -> list[Sample]:
        self._groups += 1
        return [self._one(self._groups - 1, i, pending, fields) for i in range(size)]

    def _one(self, group_index: int, place: int, pending: bool, fields: dict[str, Any]) -> Sample:
        number = self._made
        self._made += 1
        identity = {"group_index": group_index, "index": number, "rollout_id": number}
        if self._own is None:
            answer = {} if pending else {"response": _ANSWERS[place % len(_ANSWERS)]}
            return (make_prompt if pending else make_sample)(**identity, **answer, **fields)
        sample = copy.deepcopy(self._own[number % len(self._own)])
        if pending:
            sample.reset_for_retry()
        elif not sample.tokens:
            made = make_sample(prompt=sample.prompt, response=sample.response)
            for name in ("tokens", "response_length", "rollout_log_probs", "status", "weight_versions"):
                setattr(sample, name, getattr(made, name))
        sample.reward = None
        for name, value in {**identity, **fields}.items():
            setattr(sample, name, value)
        return sample
