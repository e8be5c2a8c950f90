"""What of SGLang's protocol the local engine honours: asking for anything else is an error and not a surprise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_rollout.engines.local.errors import RequestError

if TYPE_CHECKING:
    from miles_rollout.engines.protocol import GenerateRequest, SamplingParams

__all__ = ["check_request", "check_sampling", "stop_strings"]

_NEUTRAL: dict[str, object] = {
    "spaces_between_special_tokens": True,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "stop_regex": None,
    "regex": None,
    "json_schema": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "custom_params": None,
}
"""Sampling parameters that are not served, with the value that asks for nothing."""
_NOT_SERVED = (
    *("top_logprobs_num", "token_ids_logprob", "return_hidden_states", "return_routed_experts", "lora_path"),
    *("input_embeds", "image_data", "audio_data", "video_data", "custom_logit_processor"),
)


def check_sampling(params: SamplingParams) -> None:
    """Raise `RequestError` naming the first parameter that is out of range or not supported."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(params, name)
        if value != neutral and value not in (None, "", [], {}):
            raise RequestError(f"sampling parameter {name}={value!r} is not supported by the local engine")
    bounds = (
        ("temperature", params.temperature >= 0, "≥ 0"),
        ("top_p", 0 < params.top_p <= 1, "in (0, 1]"),
        ("top_k", params.top_k == -1 or params.top_k >= 1, "-1 or ≥ 1"),
        ("min_p", 0 <= params.min_p <= 1, "in [0, 1]"),
        ("n", params.n >= 1, "≥ 1"),
        ("max_new_tokens", params.max_new_tokens is None or params.max_new_tokens >= 1, "≥ 1"),
        ("min_new_tokens", 0 <= params.min_new_tokens <= (params.max_new_tokens or 1 << 40), "0 … max_new_tokens"),
    )
    for name, ok, want in bounds:
        if not ok:
            raise RequestError(f"sampling parameter {name}={getattr(params, name)!r} must be {want}")


def check_request(request: GenerateRequest) -> None:
    """Raise `RequestError` naming the first field that asks for something not served here."""
    for name in _NOT_SERVED:
        if getattr(request, name):
            raise RequestError(f"request field {name!r} is not supported by the local engine")
    if (request.text is None) == (request.input_ids is None):
        raise RequestError("give exactly one of 'text' and 'input_ids'")


def stop_strings(params: SamplingParams) -> tuple[str, ...]:
    """Return `stop` as a tuple without empty strings."""
    if params.stop is None:
        return ()
    return tuple(s for s in ([params.stop] if isinstance(params.stop, str) else params.stop) if s)
