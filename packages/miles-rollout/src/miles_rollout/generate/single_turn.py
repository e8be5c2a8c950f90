"""The default generation: one prompt, one answer."""

from __future__ import annotations

import hashlib

from miles_api.errors import DataError, ServiceError
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Sample, Status
from miles_rollout.tokenizers import encode

__all__ = ["generate", "sampling_seed"]


def sampling_seed(rollout_seed: int, sample_index: int | None, turn: int, *, evaluation: bool = False) -> int:
    """Derive the seed of one generation, so that it depends on nothing but these numbers."""
    use = "eval" if evaluation else "train"
    digest = hashlib.blake2b(f"{use}/{rollout_seed}/{sample_index}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
    """Send the prompt (and what was already generated) to the engines and append the answer."""
    state, sample, args = input.state, input.sample, input.args
    if not sample.tokens:
        sample.tokens = list(encode(state.tokenizer, str(sample.prompt)))
    params = dict(input.sampling_params)
    params["max_new_tokens"] = _room(args.rollout_max_context_len, sample, params["max_new_tokens"])
    if params["max_new_tokens"] == 0:
        sample.append_response_tokens([], log_probs=[])
        sample.status = Status.TRUNCATED
        return GenerateFnOutput(samples=sample)
    seed = sampling_seed(args.rollout_seed, sample.index, 0, evaluation=input.evaluation)
    params.setdefault("sampling_seed", seed)
    reply = await state.post(
        "/generate", {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True}
    )
    meta = reply["meta_info"]
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    ids = [entry[1] for entry in meta["output_token_logprobs"]]
    if "output_ids" in reply and reply["output_ids"] != ids:
        raise ServiceError(f"sample {sample.index}: the engine's output_ids and output_token_logprobs differ")
    sample.append_response_tokens(ids, log_probs=log_probs, text=reply["text"])
    sample.update_from_meta_info(meta)
    return GenerateFnOutput(samples=sample)


def _room(context: int | None, sample: Sample, wanted: int) -> int:
    left = wanted - sample.response_length
    if context is not None:
        left = min(left, context - len(sample.tokens))
        if left < 0 and sample.response_length == 0:
            raise DataError(
                f"sample {sample.index}: its prompt has {len(sample.tokens)} tokens, more than "
                f"--rollout-max-context-len {context}; filter with --rollout-max-prompt-len"
            )
    return max(left, 0)
