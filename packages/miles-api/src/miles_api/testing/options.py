"""`args` for a hook that is called outside a run: every option that hooks may rely on, at its default or as given."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.args import Args
from miles_api.config import option_groups
from miles_api.errors import ConfigError, did_you_mean
from miles_api.options import Options
from miles_api.parsing.given import Given, convert
from miles_api.parsing.hook_arguments import StructOptions
from miles_api.parsing.parser_arguments import ParserOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ReliedOn", "flat_options", "hook_args"]

_SOURCE = "hook_args"
_OF_A_SMALL_RUN = {
    "rollout_batch_size": 2, "n_samples_per_prompt": 3, "global_batch_size": 6, "num_steps_per_rollout": 1,
}  # fmt: skip
"""What a run derives, or has to be told."""


class ReliedOn(Options, frozen=True, kw_only=True):
    """The options of other packages that every hook may read, whether those packages are installed or not."""

    rollout_top_p: float = 1.0
    rollout_top_k: int = -1
    rollout_max_response_len: int = 1024
    rollout_max_prompt_len: int | None = None
    rollout_max_context_len: int | None = None
    rollout_stop: list[str] | None = None
    rollout_stop_token_ids: list[int] | None = None
    rollout_skip_special_tokens: bool = True
    rollout_seed: int = 42
    rollout_shuffle: bool = False
    partial_rollout: bool = False
    over_sampling_batch_size: int | None = None
    sglang_router_ip: str | None = "127.0.0.1"
    sglang_router_port: int | None = 30000
    sglang_server_concurrency: int = 256
    rollout_num_gpus: int | None = None
    rollout_num_gpus_per_engine: int = 1
    rm_type: str | None = None
    rm_url: str | None = None
    reward_key: str | None = None
    group_rm: bool = False
    advantage_estimator: str = "grpo"
    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    kl_loss_coef: float = 0.0
    entropy_coef: float = 0.0
    use_tis: bool = False
    get_mismatch_metrics: bool = False
    tis_clip: float = 2.0
    tis_clip_low: float = 0.0
    calculate_per_token_loss: bool = False
    qkv_format: str = "thd"
    context_parallel_size: int = 1
    chat_template_path: str | None = None
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] = {}
    input_key: str = "prompt"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str | None = None
    multimodal_keys: dict[str, str] | None = None
    eval_max_context_len: int | None = None
    n_samples_per_eval_prompt: int = 1


def hook_args(hook: Any = None, /, **options: Any) -> Args:
    """Return the `args` that a hook gets, with `options` set by name and all others at their defaults.

    `hook` may bring options of its own. Raises `ConfigError` for a name that is no option, with the nearest one, and
    for a value of the wrong kind.
    """
    return Args(flat_options(hook, {name: Given(value, _SOURCE) for name, value in options.items()}))


def flat_options(hook: Any, given: Mapping[str, Given]) -> dict[str, Any]:
    """Return every option by name: those of all installed packages, those that hooks rely on, those of `hook`."""
    given = {**{name: Given(value, _SOURCE) for name, value in _OF_A_SMALL_RUN.items()}, **given}
    problems: list[str] = []
    flat: dict[str, Any] = {}
    for kind in (ReliedOn, *option_groups().values()):
        mine = {name: given[name] for name in kind.__struct_fields__ if name in given}
        flat |= msgspec.structs.asdict(kind(**convert(kind, mine, problems)))
    for brought in _brought(hook):
        flat |= brought.values(given, problems).values
    problems += [f"{name} is no option{did_you_mean(name, flat)}" for name in given if name not in flat]
    if problems:
        raise ConfigError("\n".join(problems))
    return flat


def _brought(hook: Any) -> list[StructOptions | ParserOptions]:
    found: list[StructOptions | ParserOptions] = []
    kind, add_arguments = getattr(hook, "options", None), getattr(hook, "add_arguments", None)
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct):
        found.append(StructOptions(kind, "the hook", ["hook"]))
    if callable(add_arguments):
        found.append(ParserOptions(add_arguments, "the hook", ["hook"]))
    return found
