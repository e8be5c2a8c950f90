"""The steps of a generation that Miles offers to generate hooks: prompt ids, request, answer."""

from __future__ import annotations

from typing import Any

from miles_api.errors import SampleError
from miles_api.sample import Sample, Status

__all__ = ["compute_prompt_ids_from_sample", "compute_request_payload", "update_sample_from_response"]


def compute_prompt_ids_from_sample(state: Any, sample: Sample, tools: Any = None) -> list[int]:
    """Tokenise a sample's prompt; chat messages go through the chat template first."""
    if sample.multimodal_inputs:
        raise SampleError(f"sample {sample.index} has multimodal inputs, which this version does not take")
    prompt = sample.prompt
    if not isinstance(prompt, str):
        prompt = state.tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
    return list(state.tokenizer.encode(prompt, add_special_tokens=False))


def compute_request_payload(
    args: Any, input_ids: list[int], sampling_params: dict[str, Any], multimodal_inputs: Any = None
) -> tuple[dict[str, Any] | None, Status | None]:
    """Return the body of a `/generate` request, or None and the status where no token may be added."""
    if multimodal_inputs:
        raise SampleError("multimodal inputs are given, which this version does not take")
    params = dict(sampling_params)
    room = params.get("max_new_tokens", args.rollout_max_response_len)
    if args.rollout_max_context_len is not None:
        room = min(room, args.rollout_max_context_len - len(input_ids))
    if room <= 0:
        return None, Status.TRUNCATED
    params["max_new_tokens"] = room
    return {"input_ids": input_ids, "sampling_params": params, "return_logprob": True}, None


async def update_sample_from_response(
    args: Any,  # noqa: ARG001
    sample: Sample,
    payload: dict[str, Any],
    output: dict[str, Any],
    update_loss_mask: bool = False,
) -> None:
    """Append an engine's answer to `sample` and take its status and counts."""
    if not sample.tokens:
        sample.tokens = list(payload["input_ids"])
    if update_loss_mask and sample.loss_mask is None:
        sample.loss_mask = [1] * sample.response_length
    entries = output["meta_info"].get("output_token_logprobs") or []
    sample.append_response_tokens(
        [entry[1] for entry in entries], log_probs=[entry[0] for entry in entries], text=output["text"]
    )
    sample.update_from_meta_info(output["meta_info"])
