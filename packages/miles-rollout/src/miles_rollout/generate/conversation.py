"""One conversation of several turns: which ids each request continues, and what becomes a sample of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import DataError
from miles_api.sample import Sample, Status
from miles_rollout.generate.chat import ChatTemplate, Messages, spoken
from miles_rollout.generate.tool_calls import parse_tool_calls
from miles_rollout.generate.tools import COUNTS, Tools
from miles_rollout.generate.turn import Answer, ask, one_conversation, room, sibling

if TYPE_CHECKING:
    from miles_api.rollout_types import GenerateFnInput
    from miles_rollout.generate.options import GenerateOptions
    from miles_rollout.generate.tool_calls import Parser

__all__ = ["UNFINISHED", "Conversation"]

UNFINISHED = "unfinished_conversation"
"""The metadata key of what a conversation that was cut goes on from: its messages, its turn, the ids of its answer."""
_COUNTS = ("turns", *COUNTS, "turn_timeouts", "observation_tokens")


class Conversation:
    """Asks and shows by turns, from the prompt in `request.sample.tokens` on.

    The ids of the whole conversation only grow: what the engine continues begins with all that it was sent and answered
    before. With `--generate-multi-samples` each answer is a sample of its own, and its prompt what the chat template
    renders; where that is the text of the ids so far, it is these ids.

    One that is cut, and is one sample, says in its metadata where: it goes on there when it is held again.
    """

    def __init__(
        self, request: GenerateFnInput, options: GenerateOptions, template: ChatTemplate, parser: Parser, tools: Tools
    ) -> None:
        self._request, self._options = request, options
        self._template, self._parser, self._tools = template, parser, tools
        prompt = request.sample.prompt
        # A text prompt has no messages; any will do as the past of a template that only appends.
        self._history: Messages = [{"role": "user", "content": ""}] if isinstance(prompt, str) else list(prompt)
        self._start = len(request.sample.tokens) - request.sample.response_length
        self._seen: list[int] = request.sample.tokens
        self._samples: list[Sample] = []
        self._begun: list[int] = []
        """Ids of the answer that an earlier rollout has cut."""

    async def hold(self) -> list[Sample]:
        """Return the samples of the finished conversation: one, or with `--generate-multi-samples` one an answer.

        In evaluation it is the last answer's alone, so that each conversation counts once.
        """
        sample, first = self._resume(self._request.sample)
        for turn in range(first, self._options.generate_max_turns):
            answer = await self._answer(sample, turn)
            if answer is None or sample.status is not Status.COMPLETED:
                break
            text = spoken(self._request.state.tokenizer, answer.ids)
            _, calls = parse_tool_calls(text, self._parser, self._tools.specs)
            if not calls:
                break
            if turn + 1 == self._options.generate_max_turns:
                sample.metadata["tool_calls"] += len(calls)
                sample.status = Status.TRUNCATED
                break
            shown = await self._tools.run(sample, turn, calls)
            following = self._show(sample, answer, text, shown)
            if following is None:
                sample.status = Status.TRUNCATED
                break
            sample = following
        self._drop_empty()
        return self._samples[-1:] if self._request.evaluation else one_conversation(self._samples)

    def _drop_empty(self) -> None:
        """Let the answer before be the last one, where the last never came."""
        if len(self._samples) > 1 and self._samples[-1].response_length == 0:
            empty = self._samples.pop()
            self._samples[-1].status = empty.status
            self._samples[-1].metadata["turn_timeouts"] += empty.metadata["turn_timeouts"]

    def _resume(self, sample: Sample) -> tuple[Sample, int]:
        """Return the sample to go on with, and the number of the next answer: 0, unless it was begun before."""
        cut = sample.metadata.get(UNFINISHED)
        if cut is None:
            return self._begin(sample), 0
        sample.metadata = {key: value for key, value in sample.metadata.items() if key != UNFINISHED}
        self._samples.append(sample)
        self._history, self._begun = list(cut["messages"]), list(cut["answer"])
        return sample, cut["turn"]

    def _cut(self, sample: Sample, turn: int, answer: list[int]) -> None:
        """Note where a conversation ends because its rollout has enough."""
        if sample.status is Status.ABORTED and self._request.state.aborted and not self._options.generate_multi_samples:
            cut = {"messages": list(self._history), "turn": turn, "answer": answer}
            sample.metadata = {**sample.metadata, UNFINISHED: cut}

    def _begin(self, sample: Sample) -> Sample:
        sample.metadata = {**sample.metadata, **dict.fromkeys(_COUNTS, 0)}
        if self._options.generate_multi_samples:
            sample.metadata["turn"] = len(self._samples)
        self._samples.append(sample)
        return sample

    def _room(self, sample: Sample, pending: int = 0) -> int:
        """Return how many tokens the next answer may have, those of other samples counted."""
        before = len(sample.tokens) - sample.response_length - self._start
        return room(msgspec.structs.replace(self._request, sample=sample), pending, before=max(before, 0))

    async def _answer(self, sample: Sample, turn: int) -> Answer | None:
        """Let the model answer and append that; None if it has no room, or its time was up."""
        left, aborted = self._room(sample), self._request.state.aborted
        if left == 0 or aborted:
            _ends(sample, Status.ABORTED if aborted else Status.TRUNCATED)
            return self._cut(sample, turn, self._begun)
        assert sample.tokens[: len(self._seen)] == self._seen, "what the model has seen does not change"
        deadline = asyncio.timeout(self._options.generate_turn_timeout)
        try:
            async with deadline:
                answer = await ask(self._request, sample.tokens, left, turn)
        except TimeoutError:
            if not deadline.expired():
                raise
            sample.metadata["turn_timeouts"] += 1
            return _ends(sample, Status.TRUNCATED)
        answer.append_to(sample)
        self._seen = sample.tokens
        answer = answer._replace(ids=[*self._begun, *answer.ids])
        self._begun = []
        self._cut(sample, turn, answer.ids)
        sample.metadata["turns"] += UNFINISHED not in sample.metadata
        return answer

    def _show(self, sample: Sample, answer: Answer, text: str, shown: Messages) -> Sample | None:
        """Return the sample that the next answer belongs to, with what the tools said; None if there is no room."""
        pending = self._continuation(answer, shown)
        self._history += [{"role": "assistant", "content": text}, *shown]
        if self._options.generate_multi_samples:
            return self._next(sample, pending)
        assert pending is not None, "refused before"
        if self._room(sample, len(pending)) == 0:
            return None
        sample.append_response_tokens(pending, text=self._readable(pending), trainable=False)
        sample.metadata["observation_tokens"] += len(pending)
        return sample

    def _continuation(self, answer: Answer, shown: Messages) -> list[int] | None:
        """Return what to append to the ids so far; None for a template that cannot, where it need not."""
        try:
            return self._template.continuation(self._history, shown).after(answer.ids)
        except DataError as error:
            if not self._options.generate_multi_samples:
                raise DataError(
                    f"{error}; or pass --generate-multi-samples, which makes each answer a sample of its own"
                ) from error
            if isinstance(self._request.sample.prompt, str):
                raise
            return None

    def _next(self, sample: Sample, pending: list[int] | None) -> Sample | None:
        kept = None if pending is None else sample.tokens + pending
        tokens = kept
        if not isinstance(self._request.sample.prompt, str):
            rendered = self._template.prompt(self._history)
            tokens = kept if kept is not None and self._same(kept, rendered) else rendered
        assert tokens is not None
        new = sibling(self._request.sample, tokens)
        if self._room(new) == 0:
            return None
        self._seen = tokens
        new = self._begin(new)
        new.metadata["observation_tokens"] = len(tokens) - len(sample.tokens)
        return new

    def _same(self, one: list[int], other: list[int]) -> bool:
        tokenizer = self._request.state.tokenizer
        return one == other or tokenizer.decode(one) == tokenizer.decode(other)

    def _readable(self, ids: list[int]) -> str:
        skip: Any = self._request.sampling_params.get("skip_special_tokens", True)
        return self._request.state.tokenizer.decode(ids, skip_special_tokens=skip)


def _ends(sample: Sample, status: Status) -> None:
    sample.append_response_tokens([], log_probs=[])
    sample.status = status
