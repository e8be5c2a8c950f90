"""SGLang's native HTTP protocol, 0.5.17 to 0.5.23, as msgspec Structs: what is asked and what is answered.

The local engine serves it; the rollout and the fleets speak it. A request is strict, since a misspelt field would be
ignored in silence; replies may hold more than stands here, and what older releases leave out is `UNSET`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "AbortRequest",
    "Acknowledged",
    "BeginUpdateRequest",
    "DestroyGroupRequest",
    "DetokenizeRequest",
    "ErrorReply",
    "FinishReason",
    "GenerateRequest",
    "InitGroupRequest",
    "MemoryRequest",
    "MetaInfo",
    "ModelInfo",
    "PauseRequest",
    "Reply",
    "SamplingParams",
    "TokenizeRequest",
    "UpdateFromDiskRequest",
    "UpdateFromDistributedRequest",
    "UpdateFromTensorRequest",
    "UpdateVersionRequest",
    "VersionSpan",
    "WeightsCheckRequest",
]

DEFAULT_MAX_NEW_TOKENS = 128
Selector = Literal["target", "draft", "all"]
"""Which models of an engine an update is for; since 0.5.23."""


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
    stop_regex: Any = None
    ignore_eos: bool = False
    """Only the length ends the request: stop token ids are ignored as well."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    """Keep the matched stop string or token in `text`."""
    sampling_seed: int | None = None
    """The draws depend on this and the position alone; the i-th of `n` samples uses seed + i."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    regex: Any = None
    json_schema: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    logit_bias: Any = None
    custom_params: Any = None
    stream_interval: Any = None


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /generate`; with a list of prompts, or n > 1, the reply is a list."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingParams | list[SamplingParams] = msgspec.field(default_factory=SamplingParams)
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    """-1: no log-probs of the prompt; s ≥ 0: those of positions s and up, the first being null."""
    return_text_in_logprobs: bool = False
    stream: bool = False

    # What is asked for besides tokens and their log-probs.
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

    # Hints for scheduling, routing and logging.
    session_id: Any = None
    session_params: Any = None
    routing_key: Any = None
    priority: Any = None
    log_metrics: bool = True
    extra_key: Any = None
    background: bool = False
    routed_dp_rank: Any = None
    data_parallel_rank: Any = None


class FinishReason(msgspec.Struct, kw_only=True):
    """Why a sample ended; which of the other fields is there depends on `type`."""

    type: str
    """`stop`, `length` or `abort`."""
    matched: int | str | list[int] | None | UnsetType = UNSET
    """Of a stop: the token, or the string, that ended it."""
    length: int | UnsetType = UNSET
    """Of a length: the limit that was reached."""
    message: str | None | UnsetType = UNSET
    """Of an abort, as the two below."""
    status_code: int | None | UnsetType = UNSET
    err_type: str | None | UnsetType = UNSET


class VersionSpan(msgspec.Struct, kw_only=True):
    """Output tokens `start` to `end`, the latter not among them, were drawn with the weights `version`."""

    version: str
    start: int
    end: int


class MetaInfo(msgspec.Struct, kw_only=True):
    """What is said about one reply besides its text and tokens; engines of tests may leave most of it out."""

    id: str | UnsetType = UNSET
    finish_reason: FinishReason | None
    """None while it is streamed."""
    prompt_tokens: int | UnsetType = UNSET
    completion_tokens: int | UnsetType = UNSET
    cached_tokens: int | UnsetType = UNSET
    """Prompt tokens whose keys and values were copied, not computed."""
    weight_version: str | UnsetType = UNSET
    """The weights at the end; `default` until they are updated."""
    weight_versions: list[VersionSpan] | UnsetType = UNSET
    """Which tokens were drawn with which weights; not before 0.5.20."""
    e2e_latency: float | UnsetType = UNSET
    output_token_logprobs: list[tuple[float, int, str | None]] | UnsetType = UNSET
    """Log-prob in nats, at the request's temperature, token and, if asked for, its text."""
    input_token_logprobs: list[tuple[float | None, int, str | None]] | UnsetType = UNSET
    """The same of the prompt, at temperature 1 whatever the request's; the first is null."""


class Reply(msgspec.Struct, kw_only=True):
    """One sample; `index` tells streamed samples of one request apart."""

    text: str
    output_ids: list[int] | UnsetType = UNSET
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


class _Error(msgspec.Struct, kw_only=True):
    message: str


class ErrorReply(msgspec.Struct, kw_only=True):
    """What `/generate` answers with 400 and more: an `error`, or a `message` if the body was not even read."""

    error: _Error | str | UnsetType = UNSET
    message: str | UnsetType = UNSET

    def reason(self) -> str:
        """Return what it says, wherever it says so; empty if it says nothing."""
        said = self.error.message if isinstance(self.error, _Error) else self.error or self.message
        return said or ""


class Acknowledged(msgspec.Struct, kw_only=True):
    """What the update endpoints answer: `success` with 200, or not with 400."""

    success: bool
    message: str = ""


class ModelInfo(msgspec.Struct, kw_only=True):
    """What `GET /model_info` answers."""

    model_path: str
    tokenizer_path: str
    is_generation: bool
    weight_version: str


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

    mode: Literal["abort", "retract", "in_place"] = "abort"


class MemoryRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /release_memory_occupation` and `/resume_memory_occupation`."""

    tags: list[str] | None = None
    """`weights`, `kv_cache`, `cuda_graph`; none or an empty list means all."""


class BeginUpdateRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /begin_weight_update`, since 0.5.23; `/end_weight_update` takes an empty object."""

    selector: Selector = "all"
    anew: bool = False
    """Of an engine that stages weights: drop what an open session holds. SGLang does not know it."""


class _Update(msgspec.Struct, kw_only=True):
    weight_version: str | None = None
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class UpdateFromDiskRequest(_Update, kw_only=True):
    """The body of `POST /update_weights_from_disk`."""

    model_path: str


class UpdateFromTensorRequest(_Update, kw_only=True):
    """The body of `POST /update_weights_from_tensor`; since 0.5.23 within a session."""

    serialized_named_tensors: list[str]
    """One for each tensor-parallel rank of the engine, in base64."""


class UpdateFromDistributedRequest(_Update, kw_only=True):
    """The body of `POST /update_weights_from_distributed`; since 0.5.23 within a session."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"


class InitGroupRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /init_weights_update_group`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroupRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /destroy_weights_update_group`."""

    group_name: str = "weight_update_group"


class UpdateVersionRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /update_weight_version`; it aborts what is running unless told not to."""

    new_version: str
    abort_all_requests: bool = True


class WeightsCheckRequest(msgspec.Struct, kw_only=True):
    """The body of `POST /weights_checker`."""

    action: str = "checksum"
