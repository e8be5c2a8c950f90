"""What can be set about rollouts: sampling, the loop, prompts, rewards, engines, evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from miles_api.options import Options, References, UserPath

__all__ = [
    "DataOptions",
    "EngineFleetOptions",
    "EvalOptions",
    "FailureOptions",
    "RewardOptions",
    "RolloutOptions",
]

_Positive = Annotated[int, msgspec.Meta(ge=1)]
# Bounded, so that `inf` is refused: TOML, JSON and timers have different ideas of it.
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
_Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]


class RolloutOptions(Options, frozen=True, kw_only=True):
    """How responses are sampled and how many requests run at once."""

    rollout_top_p: _Probability = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    rollout_top_k: Annotated[int, msgspec.Meta(ge=-1)] = -1
    """Keep the k most probable tokens; -1 keeps all."""
    rollout_max_response_len: _Positive = 1024
    """Most tokens generated for one response."""
    rollout_max_prompt_len: _Positive | None = None
    """Prompts of more tokens are left out of the data, and counted."""
    rollout_max_context_len: _Positive | None = None
    """Most tokens of prompt and response together."""
    rollout_stop: list[str] | None = None
    """Strings that end a response."""
    rollout_stop_token_ids: list[int] | None = None
    """Token ids that end a response, besides the model's own."""
    rollout_skip_special_tokens: bool = True
    """Leave special tokens out of the response text."""
    rollout_seed: int = 42
    """Seed of the prompt order and of sampling: each sample draws from (seed, index)."""
    over_sampling_batch_size: _Positive | None = None
    """Groups to start with when a dynamic filter drops some; default: --rollout-batch-size."""
    sglang_server_concurrency: _Positive = 256
    """Requests that run at once on each engine."""
    generate_timeout: _Seconds = 600.0
    """Seconds one generation request may take before the run stops, all attempts together: what an engine or the router
    took with it when it died is sent again."""
    partial_rollout: bool = False
    """End what still runs when a rollout has enough groups, and let these responses go on in the next one from where
    they are: --over-sampling-batch-size starts more groups than are needed. Off: they start anew. Tokens train with the
    log-probs of the weights that generated them; --use-tis corrects for their age, rollout/staleness reports it."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Leave response tokens out of the loss that older weights generated than the newest by which a rollout was made,
    and count them as rollout/offpolicy_masked_tokens. Off: with --partial-rollout and with weights pushed in flight
    they train; without either they stop the run, as only a rollout hook of your own can have kept them."""
    max_filter_attempts: _Positive = 100
    """Stop the run when dynamic filters have dropped this many times --rollout-batch-size groups in one rollout."""


class DataOptions(Options, frozen=True, kw_only=True):
    """The prompt file and how its lines become prompts."""

    prompt_data: UserPath | None = None
    """JSONL file: one JSON object a line."""
    input_key: str = "prompt"
    """Key of the prompt: a string, or a list of chat messages."""
    label_key: str | None = None
    """Key of the label, if the file has one."""
    metadata_key: str = "metadata"
    """Key of an object that becomes the sample's metadata, where a line has it."""
    tool_key: str | None = None
    """Key of a list of tool specifications for the chat template."""
    apply_chat_template: bool = False
    """Turn prompts into text with the tokenizer's chat template."""
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Extra arguments of the chat template."""
    rollout_shuffle: bool = False
    """Shuffle the prompts anew in each epoch, from --rollout-seed."""


class RewardOptions(Options, frozen=True, kw_only=True):
    """How responses are scored and scores are normalised."""

    rm_type: str | None = None
    """Built-in reward: math, deepscaler, dapo, f1, gpqa, ifbench, random, or remote_rm with --rm-url; `boxed_` in front
    grades the last \\boxed{}. Or --rm-weights, or --custom-rm-path."""
    rm_url: str | None = None
    """Where --rm-type remote_rm posts {prompt, response, label}; the answer is a number, or an object of numbers."""
    rm_concurrency: _Positive = 64
    """Requests to --rm-url that are under way at once."""
    rm_url_timeout: _Seconds = 300.0
    """Seconds in which --rm-url has to score one sample, all attempts together."""
    rm_weights: References = {}
    """Rewards that are added up, each with its weight: built-in kinds, or reward hooks as --custom-rm-path takes them.
    In place of both; every part is reported."""
    reward_key: str | None = None
    """Which entry of a dict reward trains; with --rm-weights the weighted sum, `reward`."""
    eval_reward_key: str | None = None
    """Which entry of a dict reward is reported in evaluation; default: --reward-key."""
    group_rm: bool = False
    """Call the reward hook once per group, with all its samples."""
    eval_group_rm: bool = False
    """Call the group reward in evaluation too; without it, evaluation scores sample by sample with --rm-type."""
    rewards_normalization: bool = True
    """Centre rewards within each group. Off by itself for an --advantage-estimator that centres them."""
    grpo_std_normalization: bool = True
    """Also divide by the group's standard deviation (GRPO, arXiv 2402.03300); off: Dr.GRPO, arXiv 2503.20783."""
    rm_workers: _Positive | None = None
    """Processes that grade answers for --rm-type; default: one for every two cores, at most 8. Started when needed."""
    rm_timeout: _Seconds = 10.0
    """Seconds a grading process may take for one answer before it is killed and replaced."""
    rm_on_timeout: Literal["error", "zero"] = "error"
    """An answer that gets no verdict: `error`, the reward fails and its group is tried again, as for any failing hook;
    `zero`, it scores lowest (0, or -1 with dapo). Counted either way, as rollout/rm_timeouts and rollout/rm_deaths. A
    grader that raises is an error in any case, rollout/rm_errors."""


class EngineFleetOptions(Options, frozen=True, kw_only=True):
    """Which inference engine runs, how many, where they listen, and by which key."""

    rollout_engine: Literal["local", "sglang"] = "local"
    """`local`: our own server for small models, on CPU. `sglang`: SGLang's, launched by the run or attached to."""
    rollout_num_engines: _Positive = 1
    """Engines behind the router."""
    rollout_engine_urls: list[str] | None = None
    """Addresses of SGLang servers that run already, `http://host:port`, also several with commas between: they are used
    and watched, but never started, replaced or stopped. They must have been started with the model of --hf-checkpoint,
    or one with its tokens."""
    engine_health_timeout: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 300.0
    """Seconds that an engine which lives may not react (to `/server_info`, which even a busy or paused one answers)
    until it counts as dead. Longer than loading weights takes; 0 never asks."""
    engine_host: str = "127.0.0.1"
    """Address the engines listen on; 0.0.0.0 or :: are all of the machine's. Anything but loopback can be reached from
    other machines: such engines ask for a key. On a Ray cluster of several nodes each engine listens on its node's own
    address in place of loopback."""
    engine_start_timeout: _Seconds = 300.0
    """Seconds an engine may take to load its model and answer."""
    rollout_engine_base_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    """First port of the engines, counted up; by default the system picks free ones."""
    engine_key_variable: str | None = None
    """The environment variable that holds the key which engines ask for, sent as a bearer token: those of
    --rollout-engine-urls, or those that the run starts. By default it makes one up for engines that other machines can
    reach, and there is none for the others."""


class EvalOptions(Options, frozen=True, kw_only=True):
    """Held-out prompts, evaluated every --eval-interval rollouts."""

    eval_prompt_data: UserPath | None = None
    """JSONL file of held-out prompts, with the same keys as --prompt-data."""
    n_samples_per_eval_prompt: _Positive = 1
    """Samples generated for each held-out prompt."""
    eval_temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Temperature of evaluation; 0 is greedy."""
    eval_top_p: _Probability = 1.0
    """As --rollout-top-p, in evaluation."""
    eval_max_response_len: _Positive | None = None
    """As --rollout-max-response-len, in evaluation; default: the same."""


class FailureOptions(Options, frozen=True, kw_only=True):
    """What happens when a hook of the rollout process raises, hangs or returns what it may not."""

    hook_timeout: _Seconds = 1800.0
    """Seconds one call of a generate, reward, filter, conversion or logging hook may take."""
    hook_retries: Annotated[int, msgspec.Meta(ge=0)] = 1
    """How often a failed generate, reward or filter call is repeated before its group starts over, once."""
    hook_error_budget: str = "16,10%"
    """How many groups of the run may be dropped because a hook failed for good; past it the run stops with the hook's
    own traceback. A number, a share (10%) of the groups started, or both: then the smaller counts."""
