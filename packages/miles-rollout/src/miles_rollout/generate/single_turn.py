"""The default generation: one prompt, one answer."""

from __future__ import annotations

from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Status
from miles_rollout.generate.chat import prompt_ids
from miles_rollout.generate.turn import ask, room, sampling_seed
from miles_rollout.state import State

__all__ = ["generate", "sampling_seed"]


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
    """Send the prompt (and what was already generated) to the engines and append the answer."""
    sample = input.sample
    if not sample.tokens:
        state = input.state
        tokenizer = state.prompt_tokenizer if isinstance(state, State) else state.tokenizer
        sample.tokens = prompt_ids(tokenizer, input.args, sample)
    left = room(input)
    if left == 0:
        sample.append_response_tokens([], log_probs=[])
        sample.status = Status.TRUNCATED
        return GenerateFnOutput(samples=sample)
    answer = await ask(input, sample.tokens, left, 0, joint=True)
    answer.append_to(sample)
    return GenerateFnOutput(samples=sample)
