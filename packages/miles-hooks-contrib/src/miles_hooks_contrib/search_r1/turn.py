"""One turn of the model: a request to the engines, and which of its tokens are the turn."""

from __future__ import annotations

import bisect
import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from miles_api.errors import DataError, ServiceError
from miles_hooks_contrib.search_r1.tags import STOPS

if TYPE_CHECKING:
    from miles_api.rollout_types import GenerateFnInput

__all__ = ["Turn", "ask", "room"]


class Turn(NamedTuple):
    """What the model generated, up to the token with which a search or an answer ends."""

    ids: list[int]
    log_probs: list[float]
    """In nats, one for each id."""
    text: str
    """Without what marks the end of a text."""
    meta: dict[str, Any]
    """The engine's `meta_info`."""

    @property
    def ended(self) -> str:
        """What ended it: `stop`, `length` or `abort`."""
        return "stop" if any(stop in self.text for stop in STOPS) else self.meta["finish_reason"]["type"]


async def ask(request: GenerateFnInput, max_new_tokens: int, number: int) -> Turn:
    """Let the engines continue the sample's tokens until an action is complete; `number` counts the turns.

    An engine stops at the token that completes a closing tag, which may hold more than the tag's end: that token stays
    whole, as the model generated it, and tokens behind it are left out.

    Raises `ServiceError` when the engine refuses, fails or contradicts itself.
    """
    sample, tokenizer = request.sample, request.state.tokenizer
    params = dict(request.sampling_params)
    params["stop"] = [*_listed(params.get("stop")), *STOPS]
    # Tags that are special tokens of their own are text of the turn.
    params |= {"max_new_tokens": max_new_tokens, "no_stop_trim": True, "skip_special_tokens": False}
    params.setdefault("sampling_seed", _seed(request, number))
    reply = await request.state.post(
        "/generate", {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True}
    )
    meta = reply["meta_info"]
    pairs = meta.pop("output_token_logprobs")
    log_probs, ids = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    seen = meta.get("prompt_tokens", len(sample.tokens))
    # Router middleware that changes a prompt says so.
    if seen != len(sample.tokens) and not meta.get("changed_tokens_by"):
        raise ServiceError(
            f"sample {sample.index}: the engine saw a prompt of {seen} tokens, and {len(sample.tokens)} were sent: "
            "what it continued is not what the sample records"
        )
    if reply.get("output_ids", ids) != ids:
        raise ServiceError(f"sample {sample.index}: the engine's output_ids and output_token_logprobs differ")
    kept = _kept(tokenizer, ids)
    return Turn(ids[:kept], log_probs[:kept], _spoken(tokenizer, ids[:kept]), meta)


def room(request: GenerateFnInput) -> int:
    """Return how many tokens the response may still grow by, passages included; at least 0.

    Raises `DataError` for a prompt that is too long by itself.
    """
    sample, context = request.sample, request.args.rollout_max_context_len
    left = request.sampling_params["max_new_tokens"] - sample.response_length
    if context is not None:
        if sample.response_length == 0 and len(sample.tokens) > context:
            raise DataError(
                f"sample {sample.index}: its prompt has {len(sample.tokens)} tokens, more than "
                f"--rollout-max-context-len {context}; filter with --rollout-max-prompt-len"
            )
        left = min(left, context - len(sample.tokens))
    return max(left, 0)


def _kept(tokenizer: Any, ids: list[int]) -> int:
    """Return how many ids reach up to the one that completes the first closing tag; all without one."""

    def complete(count: int) -> bool:
        text = tokenizer.decode(ids[:count], skip_special_tokens=False)
        return any(stop in text for stop in STOPS)

    return min(bisect.bisect_left(range(len(ids)), True, key=complete), len(ids)) if complete(len(ids)) else len(ids)


def _spoken(tokenizer: Any, ids: list[int]) -> str:
    end, special = len(ids), (tokenizer.eos_token_id, tokenizer.pad_token_id)
    while end and ids[end - 1] in special:
        end -= 1
    return tokenizer.decode(ids[:end], skip_special_tokens=False)


def _seed(request: GenerateFnInput, number: int) -> int:
    """Return a seed that depends on nothing but the run, the sample and the turn."""
    use = "eval" if request.evaluation else "train"
    words = f"{use}/{request.args.rollout_seed}/{request.sample.index}/{number}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest()) >> 1


def _listed(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []
