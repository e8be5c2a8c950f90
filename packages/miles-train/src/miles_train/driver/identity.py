"""What a checkpoint's parts depend on, compared between the run that saved it and the one that continues it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from miles_api.abi import ABI
from miles_api.loading.hookset import configured_hooks
from miles_api.options import flag_of
from miles_api.run_options import RunOptions
from miles_train.driver.fingerprint import weights_fingerprint
from miles_train.megatron.hf_config import read_raw_config
from miles_train.models_check import has_critic, has_reference, has_teacher, model_directories
from miles_train.options import ModelsOptions, OptimizerOptions, ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig
    from miles_train.driver.checkpoint import State

__all__ = ["changes", "identity_of", "mismatches", "options_of", "versions"]

_PACKAGES = ("miles-api", "miles-train", "miles-rollout", "miles-router", "miles-hooks-contrib")
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_DATA_OPTIONS = ("n_samples_per_prompt", "rollout_seed", "rollout_shuffle", "rollout_max_prompt_len")
"""Options by which the position in the data is a place in an order of samples."""
_ONLY_WHERE = frozenset({
    "run_dir", "overwrite", "save", "load", "resume", "load_optim", "load_rng", "reset_data_source", "save_interval",
    "save_total_limit", "save_hf", "save_debug_rollout_data", "save_debug_train_data", "report_samples", "ray_address",
    "hf_checkpoint", "prompt_data", "num_rollout", "sglang_router_ip", "sglang_router_port", "use_tensorboard",
    "use_wandb", "wandb_project", "ref_load", "opd_teacher_load",
})  # fmt: skip
"""Options that change where things lie, or whose content is compared."""


class _Part(NamedTuple):
    """A part of a checkpoint that has a meaning only under the same circumstances."""

    keys: tuple[str, ...]
    means: str
    accepts: str | None
    """The option with which the run does without it."""
    value: bool
    """What the option is then."""
    way_out: str


_DATA = _Part(
    ("data_source", "prompts", *_DATA_OPTIONS), "its position in the data means nothing here",
    "reset_data_source", True, "--reset-data-source begins with the first prompt",
)  # fmt: skip
_PARTS = (
    _Part(("model",), "its weights fit no other model", None, True,
          "take the checkpoint's own hf directory as --hf-checkpoint, or begin without it"),
    _Part(("tokenizer",), "its weights know no other tokens", None, True,
          "take the checkpoint's own hf directory as --hf-checkpoint, or begin without it"),
    _DATA,
    _Part(("critic",), "this run has a critic to continue, of this model", None, True,
          "begin without it, with the checkpoint's own hf directory as --hf-checkpoint, to train a new critic"),
    _Part(("reference",), "the KL divergence would be from another model than before", None, True,
          "pass --ref-load with the directory that the run began from"),
    _Part(("teacher",), "this run would learn from another model than before", None, True,
          "pass --opd-teacher-load with the directory that the run began with"),
    _Part(("optimizer",), "its optimizer state does not fit", "load_optim", False,
          "set --use-distributed-optimizer as it was, or --no-load-optim begins with a fresh optimizer and schedule"),
    _Part(("layout",), "its random states belong to its ranks", "load_rng", False,
          "--no-load-rng continues with fresh ones"),
)  # fmt: skip

_FROZEN = {"reference": "ref_load", "teacher": "opd_teacher_load"}
"""Models that are never trained, of which a checkpoint has the fingerprint alone, and the option that names each."""
_OPTIONAL = (*_DATA.keys, "critic", *_FROZEN)
"""Parts that not every run has."""


def identity_of(config: RunConfig) -> dict[str, Any]:
    """Return what the state of a run depends on, by content and not by path.

    Called before a run starts, when all files are known to be there; a large prompt file is read once.
    """
    run, parallel = config.group(RunOptions), config.group(ParallelOptions)
    sharded = "sharded over data-parallel ranks" if parallel.use_distributed_optimizer else "whole on each rank"
    found: dict[str, Any] = {
        "model": _model(str(run.hf_checkpoint)),
        "tokenizer": _tokenizer(Path(str(run.hf_checkpoint))),
        "optimizer": f"AdamW, {sharded}",
        "layout": f"{parallel.world_size} ranks, tensor {parallel.tensor_model_parallel_size}, "
        f"pipeline {parallel.pipeline_model_parallel_size}",
    }
    if has_critic(config):
        found["critic"] = _model(model_directories(config)["critic"][1])
    found |= {role: weights_fingerprint(model_directories(config)[role][1]) for role in _frozen(config)}
    # Recorded rollouts bring their prompts along: there is no position in any data.
    return found if run.load_debug_rollout_data is not None else found | _data(config)


def options_of(config: RunConfig) -> dict[str, Any]:
    """Return the options as a checkpoint holds them."""
    return json.loads(json.dumps(config.public(), default=str))


def versions() -> dict[str, str]:
    """Return the versions of our installed packages, and of the hook ABI."""
    found = {"hook ABI": ".".join(map(str, ABI))}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def mismatches(state: State, config: RunConfig, folder: Path) -> Iterator[str]:
    """Yield in words what of a checkpoint means nothing in this run and was not given up by a flag."""
    run, now = config.group(RunOptions), identity_of(config)
    for part in _PARTS:
        if part.accepts is not None and getattr(run, part.accepts) is part.value:
            continue
        keys = [key for key in part.keys if _compared(key, state, now) and state.identity.get(key) != now.get(key)]
        if keys:
            before, here = _shown(state.identity, state.options, keys), _shown(now, config.flat(), keys)
            yield f"checkpoint {folder} was saved with {before}; this run has {here}: {part.means}; {part.way_out}"


def _compared(key: str, state: State, now: dict[str, Any]) -> bool:
    """Say whether a part counts: a run without a data source leaves the position where it is, one without a critic
    leaves that unread; and a frozen model may be new to the run, or the checkpoint older than its fingerprint."""
    return (key in now or key not in _OPTIONAL) and (key in state.identity or key not in _FROZEN)


def changes(state: State, config: RunConfig) -> list[str]:
    """Return in words what differs from the run that saved, and changes how this one goes on."""
    now, before = options_of(config), state.options
    ours = versions()
    known = {key: value for key, value in now.items() if key in before and key not in (*_ONLY_WHERE, *_DATA_OPTIONS)}
    pairs = [f"{key} {before[key]} → {value}" for key, value in known.items() if before[key] != value]
    pairs += [f"{key} {state.versions[key]} → {ours.get(key, 'not installed')}"
              for key in state.versions if state.versions[key] != ours.get(key)]  # fmt: skip
    found = [f"since the checkpoint: {', '.join(pairs)}"] if pairs else []
    return found + _untold(state, config) + _schedule(before, config)


def _frozen(config: RunConfig) -> list[str]:
    return [role for role, has in (("reference", has_reference), ("teacher", has_teacher)) if has(config)]


def _untold(state: State, config: RunConfig) -> list[str]:
    """Say of which models it is not known that they are those of before."""
    return [
        f"the checkpoint does not say which {role} its run had, if any: this run has {path} ({flag}); where it began "
        f"with another, pass {flag_of(_FROZEN[role])} with that"
        for role in _frozen(config)
        if role not in state.identity
        for flag, path in [model_directories(config)[role]]
    ]


def _schedule(before: dict[str, Any], config: RunConfig) -> list[str]:
    run, style = config.group(RunOptions), config.group(OptimizerOptions).lr_decay_style
    alone = config.group(ModelsOptions).num_critic_only_steps
    left_out = before.get("num_critic_only_steps") or 0
    earlier = ((before.get("num_rollout") or 0) - left_out) * (before.get("num_steps_per_rollout") or 0)
    total = (run.num_rollout - alone) * (run.num_steps_per_rollout or 1)
    if style == "constant" or not run.load_optim or earlier in (0, total):
        return []
    return [
        f"num_rollout {before['num_rollout']} → {run.num_rollout}: the {style} decay ends at optimizer step {total}, "
        f"no longer at {earlier}, so the learning rate is not the one that the checkpoint left off with"
    ]


def _data(config: RunConfig) -> dict[str, Any]:
    options = config.flat()
    source = configured_hooks(config.args).get("data_source", ["the prompt file"])[0]
    path = options.get("prompt_data")
    # Of a file reference the name counts: the file may have moved.
    found = {"data_source": str(source).rpartition("/")[2], "prompts": _prompts(Path(path)) if path else None}
    return found | {key: options.get(key) for key in _DATA_OPTIONS}


def _model(hf_dir: str) -> str:
    """Return a hash of the config without what an export or another version of transformers writes differently."""
    raw = {key: value for key, value in read_raw_config(hf_dir).items() if key not in _NOT_THE_MODEL}
    return hashlib.sha256(msgspec.json.encode(raw, order="sorted")).hexdigest()[:16]


def _tokenizer(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _VOCABULARY:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _prompts(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    digest, lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
    return {"lines": lines, "sha256": digest.hexdigest()[:16]}


def _shown(identity: dict[str, Any], options: dict[str, Any], keys: list[str]) -> str:
    """Name the values of `keys`, and with a file's content the path that it had."""
    shown = {**identity, **({"prompts": _prompts_shown(identity, options)} if "prompts" in keys else {})}
    for role in set(keys) & set(_FROZEN):
        shown[role] = f"{options.get(_FROZEN[role]) or options.get('hf_checkpoint')} (weights {identity.get(role)})"
    return ", ".join(f"{key} {shown.get(key)}" for key in keys)


def _prompts_shown(identity: dict[str, Any], options: dict[str, Any]) -> str:
    content = identity.get("prompts") or {}
    return f"{options.get('prompt_data')} ({', '.join(f'{key} {value}' for key, value in content.items()) or 'none'})"
