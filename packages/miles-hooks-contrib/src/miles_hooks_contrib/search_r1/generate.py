"""Generation of Search-R1: think, search, read, think again, answer (arXiv 2503.09516).

What the model generates stays token by token as it was generated. What it is shown, passages and corrections, is
tokenised once, appended with log-prob 0 and left out of the loss.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError
from miles_api.options import options_from
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Status
from miles_hooks_contrib.search_r1.options import SearchOptions
from miles_hooks_contrib.search_r1.retrieval import Retriever, Searches, open_retriever
from miles_hooks_contrib.search_r1.tags import CORRECTION, action_of, observation
from miles_hooks_contrib.search_r1.turn import Turn, ask, room

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["SearchR1"]

_COUNTS = ("turns", "tool_calls", "malformed_tool_calls", "observation_tokens")
"""What a sample's metadata counts; the names are those of the default multi-turn generation, which are reported."""


class SearchR1:
    """The generate hook `search_r1`, built once.

    Counted in each sample's metadata: `turns`, `tool_calls` (searches), `malformed_tool_calls` (corrections) and
    `observation_tokens`.
    """

    options = SearchOptions

    def __init__(self, args: Args, retriever: Retriever | None = None) -> None:
        """Open what the options name, or search `retriever`. Raises `ConfigError` or `DataError` where it cannot."""
        self._options: SearchOptions = options_from(args, SearchOptions)
        self._retriever = retriever or open_retriever(self._options)
        self._searches: dict[asyncio.AbstractEventLoop, Searches] = {}

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
        """Hold one conversation. What cannot be searched raises, so that it is never taken for "nothing found"."""
        sample = input.sample
        # What was shown until then and where the last turn broke off is not in it: one that was begun starts anew.
        if sample.response_length:
            sample.reset_for_retry()
        if not sample.tokens:
            sample.tokens = _prompt_ids(input.state.tokenizer, input.args, sample)
        sample.metadata = {**sample.metadata, **dict.fromkeys(_COUNTS, 0)}
        await self._hold(input)
        return GenerateFnOutput(samples=sample)

    async def aclose(self) -> None:
        """Close the retriever."""
        await self._retriever.aclose()

    async def _hold(self, request: GenerateFnInput) -> None:
        """Take turns until the model answers, or may not go on."""
        sample, seen = request.sample, request.sample.tokens
        for number in range(self._options.search_max_turns + 1):
            left = room(request)
            if left == 0 or request.state.aborted:
                _end(sample, Status.ABORTED if request.state.aborted else Status.TRUNCATED)
                return
            if sample.tokens[: len(seen)] != seen:
                raise ServiceError(f"sample {sample.index}: the ids that the engine has seen were changed")
            turn = await ask(request, min(left, self._options.search_turn_len or left), number)
            _append(sample, turn)
            seen = sample.tokens
            # A turn that used up the whole response is cut off; one that only used up its own share is corrected.
            if turn.ended == "abort" or (turn.ended == "length" and len(turn.ids) >= left):
                return
            shown = await self._reply(request, turn)
            if shown is None:
                sample.status = Status.COMPLETED
                return
            if number == self._options.search_max_turns or not _show(request, shown):
                break
        sample.status = Status.TRUNCATED

    async def _reply(self, request: GenerateFnInput, turn: Turn) -> str | None:
        """Return what the model is shown next: passages or a correction; None after an answer."""
        sample, action = request.sample, action_of(turn.text)
        if action is None:
            sample.metadata["malformed_tool_calls"] += 1
            return CORRECTION
        if action.kind == "answer":
            return None
        # The turn after the last result is for the answer: nothing is searched that could not be read.
        if sample.metadata["turns"] > self._options.search_max_turns:
            return ""
        sample.metadata["tool_calls"] += 1
        started = time.perf_counter()
        try:
            found = observation(await self._here().run(action.text))
        finally:
            sample.non_generation_time += time.perf_counter() - started
        return f"\n\n<information>{self._bounded(request.state.tokenizer, found)}</information>\n\n"

    def _bounded(self, tokenizer: Any, text: str) -> str:
        """Return passages of at most `--search-result-len` tokens."""
        # Halves of characters cannot be tokenised.
        text = text.encode(errors="replace").decode()
        ids = tokenizer.encode(text, add_special_tokens=False)
        most = self._options.search_result_len
        return text if len(ids) <= most else tokenizer.decode(ids[:most], skip_special_tokens=False)

    def _here(self) -> Searches:
        """Return the searches of the running event loop: a rollout hook may run one for each rollout."""
        loop = asyncio.get_running_loop()
        if loop not in self._searches:
            self._searches = {one: held for one, held in self._searches.items() if not one.is_closed()}
            self._searches[loop] = Searches(self._retriever, self._options)
        return self._searches[loop]


def _prompt_ids(tokenizer: Any, args: Args, sample: Sample) -> list[int]:
    """Return the ids of a prompt: chat messages go through the chat template, text stands for itself."""
    prompt = sample.prompt
    if not isinstance(prompt, str):
        how = {"tokenize": False, "add_generation_prompt": True, **args.apply_chat_template_kwargs}
        prompt = tokenizer.apply_chat_template(prompt, **how)
    return list(tokenizer.encode(prompt, add_special_tokens=False))


def _append(sample: Sample, turn: Turn) -> None:
    sample.append_response_tokens(turn.ids, log_probs=turn.log_probs, text=turn.text)
    sample.update_from_meta_info(turn.meta)
    sample.metadata["turns"] += 1


def _show(request: GenerateFnInput, text: str) -> bool:
    """Append what the model is shown; False, and nothing appended, if no token could follow it."""
    sample = request.sample
    ids = list(request.state.tokenizer.encode(text, add_special_tokens=False))
    if len(ids) >= room(request):
        return False
    sample.append_response_tokens(ids, text=text, trainable=False)
    sample.metadata["observation_tokens"] += len(ids)
    return True


def _end(sample: Sample, status: Status) -> None:
    sample.append_response_tokens([], log_probs=[])
    sample.status = status
