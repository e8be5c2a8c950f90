"""The wire format: SGLang's native requests and replies, as msgspec Structs.

Names SGLang knows and this engine cannot honour are listed, so that asking for one is an error and not a surprise.
"""

from __future__ import annotations

from typing import Any

import msgspec

from miles_rollout.engines.local.errors import RequestError

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "AbortRequest",
    "DetokenizeRequest",
    "GenerateRequest",
    "MetaInfo",
    "PauseRequest",
    "Reply",
    "SamplingParams",
    "TokenizeRequest",
    "UpdateVersionRequest",
    "UpdateWeightsRequest",
]

DEFAULT_MAX_NEW_TOKENS = 128


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How one request is sampled; defaults are SGLang's."""

    max_new_tokens: int | None = None
    """At most so many new tokens; left out, 128 or what the context still holds."""
    min_new_tokens: int = 0
    """End-of-sequence and stop token ids cannot be drawn before so many tokens."""
    temperature: float = 1.0
    """0 takes the most likely token and reports its log-prob at temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    """Only the length ends the request: stop token ids are ignored as well, as in SGLang."""
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    """Keep the matched stop string or token in `text`."""
    sampling_seed: int | None = None
    """The draws depend on this and the position alone; the i-th of `n` samples uses seed + i."""

    # Known to SGLang, not served here: any value but the neutral one is refused by `check`.
    spaces_between_special_tokens: bool = True
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_regex: Any = None
    regex: Any = None
    json_schema: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    logit_bias: Any = None
    custom_params: Any = None
    stream_interval: Any = None

    def check(self) -> None:
        """Raise `RequestError` naming the first parameter that is out of range or not supported."""
        for name, neutral in _UNSUPPORTED_SAMPLING:
            value = getattr(self, name)
            if value != neutral and value not in (None, "", [], {}):
                raise RequestError(f"sampling parameter {name}={value!r} is not supported by the local engine")
        bounds = (
            ("temperature", self.temperature >= 0, "≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 or ≥ 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("n", self.n >= 1, "≥ 1"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "≥ 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= (self.max_new_tokens or 1 << 40), "0 … max_new_tokens"),
        )
        for name, ok, want in bounds:
            if not ok:
                raise RequestError(f"sampling parameter {name}={getattr(self, name)!r} must be {want}")

    def stop_strings(self) -> tuple[str, ...]:
        """Return `stop` as a tuple without empty strings."""
        if self.stop is None:
            return ()
        return tuple(s for s in ([self.stop] if isinstance(self.stop, str) else self.stop) if s)


_UNSUPPORTED_SAMPLING: tuple[tuple[str, object], ...] = (
    ("spaces_between_special_tokens", True),
    ("frequency_penalty", 0.0),
    ("presence_penalty", 0.0),
    ("repetition_penalty", 1.0),
    *(
        (name, None)
        for name in ("stop_regex", "regex", "json_schema", "ebnf", "structural_tag", "logit_bias", "custom_params")
    ),
)


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /generate`; with a list of prompts the reply is a list."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingParams | list[SamplingParams] = msgspec.field(default_factory=SamplingParams)
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    """-1: no log-probs of the prompt; s ≥ 0: those of positions s and up, the first being null."""
    return_text_in_logprobs: bool = False
    stream: bool = False

    # Accepted and without effect here: hints for scheduling, routing and logging.
    session_id: Any = None
    session_params: Any = None
    routing_key: Any = None
    priority: Any = None
    log_metrics: bool = True
    extra_key: Any = None
    background: bool = False
    routed_dp_rank: Any = None
    data_parallel_rank: Any = None

    # Known to SGLang, not served here.
    top_logprobs_num: Any = None
    token_ids_logprob: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    lora_path: Any = None
    input_embeds: Any = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    custom_logit_processor: Any = None

    def check(self) -> None:
        """Raise `RequestError` naming the first field that asks for something not served here."""
        for name in _UNSUPPORTED_FIELDS:
            if getattr(self, name):
                raise RequestError(f"request field {name!r} is not supported by the local engine")
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("give exactly one of 'text' and 'input_ids'")


_UNSUPPORTED_FIELDS = (
    "top_logprobs_num",
    "token_ids_logprob",
    "return_hidden_states",
    "return_routed_experts",
    "lora_path",
    "input_embeds",
    "image_data",
    "audio_data",
    "video_data",
    "custom_logit_processor",
)


class MetaInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is said about one reply besides its text and tokens."""

    id: str
    finish_reason: dict[str, Any] | None
    """`{"type": "stop", "matched": id | str}`, `{"type": "length", "length": n}`, `{"type": "abort", …}`; null while
    streaming."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were copied, not computed."""
    weight_version: str
    weight_versions: list[dict[str, Any]]
    """`{"version", "start", "end"}`: which output tokens were drawn with which weights."""
    e2e_latency: float
    output_token_logprobs: list[tuple[float, int, str | None]] | msgspec.UnsetType = msgspec.UNSET
    input_token_logprobs: list[tuple[float | None, int, str | None]] | msgspec.UnsetType = msgspec.UNSET


class Reply(msgspec.Struct, kw_only=True):
    """One sample; `index` tells streamed samples of one request apart."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | msgspec.UnsetType = msgspec.UNSET


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /tokenize`: one text, or several."""

    prompt: str | list[str]
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /detokenize`: the tokens of one text, or of several."""

    tokens: list[int | list[int]]
    skip_special_tokens: bool = True


class AbortRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /abort_request`: one request, with all its samples, or all requests."""

    rid: str = ""
    abort_all: bool = False


class PauseRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /pause_generation`."""

    mode: str = "abort"


class UpdateWeightsRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /update_weights_from_disk`; SGLang's other fields have no meaning on a CPU."""

    model_path: str
    weight_version: str | None = None
    abort_all_requests: bool = False


class UpdateVersionRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /update_weight_version`; like SGLang it aborts what is running unless told not to."""

    new_version: str
    abort_all_requests: bool = True
