"""The default generation: one prompt, one answer."""

from __future__ import annotations

from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Status
from miles_rollout.generate.chat import prompt_ids
from miles_rollout.generate.turn import Answer, ask, room, sampling_seed
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
    begun = sample.response_length
    answer.append_to(sample)
    if begun and answer.ids:
        sample.response = _whole_text(input, answer)
    return GenerateFnOutput(samples=sample)


def _whole_text(request: GenerateFnInput, answer: Answer) -> str:
    """Return the text of a response whose last part is `answer`: decoded in parts, a character may break in two."""
    sample, decode = request.sample, request.state.tokenizer.decode
    skip = request.sampling_params.get("skip_special_tokens", True)
    part = decode(answer.ids, skip_special_tokens=skip)
    if not part.startswith(answer.text):
        return sample.response
    whole = decode(sample.tokens[-sample.response_length :], skip_special_tokens=skip)
    # The engine has left out of the text what it stopped at.
    return whole[: len(whole) - (len(part) - len(answer.text))]
