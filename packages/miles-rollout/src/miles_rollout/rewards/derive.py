"""What follows from the options for rewards: which reward hook runs, and what cannot work with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import MilesError, problem_of
from miles_api.loading.hookset import configured_hooks
from miles_api.run_options import RunOptions
from miles_rollout.options import RewardOptions
from miles_rollout.rewards.dispatch import check_rm_type
from miles_rollout.rewards.remote import check_rm_url
from miles_rollout.rewards.weighted import NAME, TOTAL, check_weights, part_name, resolve_parts, shown_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from miles_api.config import RunConfig
    from miles_api.loading.bind import BoundHook

__all__ = ["derived", "goes_by_kind", "notes", "own_parts", "parts", "problems"]

_OUR_GENERATES = ("single_turn", "multi_turn")
"""Generate hooks that leave the reward to the reward hook."""
_REMOTE = "remote_rm"
_MAY_ASK = {"reward", "group_reward", "generate", "rollout", "reward_post_process"}
"""Hooks that may use --rm-url for themselves, as hooks written for other stacks do."""


def derived(config: RunConfig) -> dict[str, str]:
    """Return the reward hook and the key that follow from `--rm-weights`, as `{option: value}`; empty without it."""
    run, options = config.group(RunOptions), config.group(RewardOptions)
    if not options.rm_weights or options.group_rm or run.loss_type == "sft_loss" or run.load_debug_rollout_data:
        return {}
    given = {"custom_rm_path": config.flat()["custom_rm_path"], "reward_key": options.reward_key}
    return {name: value for name, value in (("custom_rm_path", NAME), ("reward_key", TOTAL)) if given[name] is None}


def notes(config: RunConfig) -> list[str]:
    """Return the weighted sum that trains, in words."""
    options = config.group(RewardOptions)
    return [f"reward: {shown_weights(options.rm_weights)}"] if options.rm_weights else []


def own_parts(config: RunConfig) -> list[str]:
    """Return the references among `--rm-weights` that are no short names: a user's own hooks."""
    return [part for part in config.group(RewardOptions).rm_weights if ":" in part or "." in part]


def parts(config: RunConfig) -> list[tuple[str, BoundHook]]:
    """Return the hooks among `--rm-weights`, with the hook that calls them; none where `problems` says what is wrong.

    They are hashed in the driver too, so that other code in the rollout process is noticed before the first rollout.
    """
    if configured_hooks(config.args).get("reward") != [NAME]:
        return []
    try:
        return [(NAME, hook) for hook in resolve_parts(config.args)]
    except MilesError:
        return []


def goes_by_kind(config: RunConfig) -> bool:
    """Say whether built-in kinds score samples one by one, by `--rm-type`, `--rm-weights` or their own metadata."""
    hooks = configured_hooks(config.args)
    own = {"rollout", "group_reward"} & set(hooks) or hooks.get("reward", [NAME]) != [NAME]
    return config.group(RunOptions).loss_type != "sft_loss" and not own


def problems(config: RunConfig, named: Iterable[str]) -> Iterator[str]:
    """Yield what does not fit together: no reward or two, kinds that are none, a server that is missing or not asked.

    `named` are the kinds that prompts name in their metadata, which the default reward hook goes by.
    """
    run, options = config.group(RunOptions), config.group(RewardOptions)
    hooks = configured_hooks(config.args)
    configured = set(hooks) - ({"generate"} if hooks.get("generate", [""])[0] in _OUR_GENERATES else set())
    evaluates = run.eval_interval is not None and "eval_rollout" not in configured
    yield from _several(options, hooks.get("reward", []))
    if options.rm_weights:
        yield from _weights(config)
    elif options.rm_type is not None:
        yield from problem_of(lambda: check_rm_type(str(options.rm_type)))
    elif not {"reward", "group_reward", "generate", "rollout"} & configured:
        yield "no reward is set: pass --rm-type or --custom-rm-path"
    elif "group_reward" in configured and evaluates and not options.eval_group_rm:
        yield "--group-rm scores training alone: evaluation needs --eval-group-rm or an --rm-type"
    elif hooks.get("reward") == [NAME]:
        yield f"--custom-rm-path {NAME} adds up --rm-weights, and none are set"
    named = [] if "reward" in configured else sorted(named)
    for kind in named:
        yield from (f"rm_type in the prompts' metadata: {text}" for text in problem_of(lambda k=kind: check_rm_type(k)))
    ours = {"reward"} if hooks.get("reward") == [NAME] and not own_parts(config) else set()
    yield from _server(options, {options.rm_type, *named, *options.rm_weights}, bool(_MAY_ASK & (configured - ours)))


def _several(options: RewardOptions, own: list[str]) -> Iterator[str]:
    """Yield a problem where more than one of the three ways to name a reward is taken."""
    given = [f"--rm-type {options.rm_type}"] if options.rm_type is not None else []
    given += ["--custom-rm-path"] if own and not (options.rm_weights and own == [NAME]) else []
    given += ["--rm-weights"] if options.rm_weights else []
    if len(given) > 1:
        yield f"{' and '.join(given)} are both set, and only one reward can be: drop one"


def _weights(config: RunConfig) -> Iterator[str]:
    options = config.group(RewardOptions)
    if options.group_rm:
        yield "--rm-weights scores sample by sample, and --group-rm whole groups: drop one"
    found = list(problem_of(lambda: check_weights(options.rm_weights)))
    yield from found
    if not found:
        yield from problem_of(lambda: resolve_parts(config.args))
    names = [TOTAL, *map(part_name, options.rm_weights)]
    for flag, key in (("--reward-key", options.reward_key), ("--eval-reward-key", options.eval_reward_key)):
        if key is not None and key not in names:
            yield f"{flag} {key} is not among what --rm-weights gives: {', '.join(names)}"


def _server(options: RewardOptions, kinds: set[str | None], hooks_may_ask: bool) -> Iterator[str]:
    if options.rm_url is None:
        if _REMOTE in kinds:
            yield "remote_rm asks a server, and none is set: pass --rm-url http://HOST:PORT/PATH"
        return
    yield from problem_of(lambda: check_rm_url(str(options.rm_url)))
    if options.rm_type == _REMOTE and options.eval_reward_key is not None and options.reward_key is None:
        yield (
            f"--eval-reward-key {options.eval_reward_key} picks from what remote_rm answers, and nothing says which "
            "entry trains: pass --reward-key too"
        )
    if _REMOTE not in kinds and not hooks_may_ask:
        yield "--rm-url is set, and nothing asks it: pass --rm-type remote_rm"
