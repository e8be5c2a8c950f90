"""One request to the engines: how long it may be, what it draws from, and what comes back."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import UNSET

from miles_api.errors import DataError, ServiceError
from miles_rollout.engines.protocol import Reply
from miles_rollout.pristine import without_response
from miles_rollout.state import State

if TYPE_CHECKING:
    from miles_api.rollout_types import GenerateFnInput
    from miles_api.sample import Sample

__all__ = ["TAKES_LAST_REWARD", "Answer", "ask", "one_conversation", "parse_reply", "room", "sampling_seed", "sibling"]

TAKES_LAST_REWARD = "takes_last_reward"
"""The metadata key of a sample whose reward is that of the last sample of its conversation."""


class Answer(NamedTuple):
    """What the engine generated."""

    ids: list[int]
    log_probs: list[float]
    """In nats, one for each id."""
    text: str
    meta: dict[str, Any]
    """The engine's `meta_info` without the log-probs: agents' answers are kept until their conversation is over."""

    def append_to(self, sample: Sample) -> None:
        """Append the tokens to the sample's response as trained ones; take over status, versions and cache counts."""
        sample.append_response_tokens(self.ids, log_probs=self.log_probs, text=self.text)
        sample.update_from_meta_info(self.meta)


def sampling_seed(rollout_seed: int, sample_index: int | None, turn: int, *, evaluation: bool = False) -> int:
    """Derive the seed of one generation, so that it depends on nothing but these numbers."""
    use = "eval" if evaluation else "train"
    digest = hashlib.blake2b(f"{use}/{rollout_seed}/{sample_index}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


async def ask(
    request: GenerateFnInput, tokens: list[int], max_new_tokens: int, turn: int, *, joint: bool = False, **sampling: Any
) -> Answer:
    """Let the engines continue `tokens`; `sampling` overrides the request's sampling parameters.

    A `joint` request may travel with those of the same group, and then waits for the slowest of them.

    Raises `ServiceError` when the engine refuses, fails or contradicts itself.
    """
    sample, args = request.sample, request.args
    params = {**request.sampling_params, **sampling, "max_new_tokens": max_new_tokens}
    params.setdefault(
        "sampling_seed", sampling_seed(args.rollout_seed, sample.index, turn, evaluation=request.evaluation)
    )
    payload = {"input_ids": tokens, "sampling_params": params, "return_logprob": True}
    state = request.state
    if joint and isinstance(state, State):
        # Evaluation numbers its groups anew; a sample that nobody numbered stays alone.
        group = id(sample) if sample.group_index is None else (request.evaluation, sample.group_index)
        reply = await state.joint.generate(group, payload)
    else:
        reply = await state.post("/generate", payload)
    read = parse_reply(reply)
    meta, seen = reply["meta_info"], read.meta_info.prompt_tokens
    # Middleware that changes a prompt says so, and its name stands in the sample.
    if seen not in (UNSET, len(tokens)) and not meta.get("changed_tokens_by"):
        raise ServiceError(
            f"sample {sample.index}: the engine saw a prompt of {seen} tokens, and {len(tokens)} were sent: what it "
            "continued is not what the sample records"
        )
    pairs, ended = read.meta_info.output_token_logprobs, read.meta_info.finish_reason
    if pairs is UNSET and ended is not None and ended.type == "abort":
        return _nothing(meta)
    if pairs is UNSET:
        raise ServiceError(f"sample {sample.index}: the engine's answer has no output_token_logprobs")
    log_probs, ids = [entry[0] for entry in pairs], [entry[1] for entry in pairs]
    if read.output_ids not in (UNSET, ids):
        raise ServiceError(f"sample {sample.index}: the engine's output_ids and output_token_logprobs differ")
    del meta["output_token_logprobs"]
    return Answer(ids, log_probs, read.text, meta)


def _nothing(meta: dict[str, Any]) -> Answer:
    """Return an aborted answer without log-probs, as engines give one that still waited: its tokens cannot train."""
    return Answer([], [], "", {**meta, "completion_tokens": 0, "weight_versions": None})


def parse_reply(answer: Any) -> Reply:
    """Return the decoded answer of `/generate` for one sample as a `Reply`.

    Raises `ServiceError` naming the field that is missing or of another type.
    """
    try:
        return msgspec.convert(answer, Reply)
    except msgspec.ValidationError as error:
        raise ServiceError(f"the engine's answer is not SGLang's: {error}; it is {str(answer)[:300]}") from None


def room(request: GenerateFnInput, pending: int = 0, *, before: int = 0) -> int:
    """Return how many tokens may still be generated after `pending` more tokens that were not; at least 0.

    The whole response counts, tool output included, and `before`: tokens of this conversation's response that stand in
    the prompt of the sample. Raises `DataError` for a prompt that is too long by itself.
    """
    sample, context = request.sample, request.args.rollout_max_context_len
    left = request.sampling_params["max_new_tokens"] - sample.response_length - pending - before
    if context is not None:
        left = min(left, context - len(sample.tokens) - pending)
        if sample.response_length == before == 0 and len(sample.tokens) > context:
            raise DataError(
                f"sample {sample.index}: its prompt has {len(sample.tokens)} tokens, more than "
                f"--rollout-max-context-len {context}; filter with --rollout-max-prompt-len"
            )
    return max(left, 0)


def sibling(sample: Sample, tokens: list[int]) -> Sample:
    """Return a sample for another stretch of the conversation of `sample`, whose prompt is `tokens`.

    It has the same prompt, label, metadata and numbers, `rollout_id` among them, and no response yet.
    """
    other = without_response(sample)
    other.tokens = tokens
    return other


def one_conversation(samples: list[Sample]) -> list[Sample]:
    """Mark the samples of one conversation: the reward hook scores the last, and the others take its reward.

    One that has a reward keeps it. Under `--group-rm` the hook sees them all and scores each.
    """
    for sample in samples[:-1]:
        sample.metadata = {**sample.metadata, TAKES_LAST_REWARD: True}
    return samples
