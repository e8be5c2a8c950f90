"""The hooks that a trainer rank calls: resolved in one place, and each failure says where training was."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_api.loading.hookset import HookSet, configured_hooks
from miles_api.run_options import RunOptions
from miles_train.models_check import has_critic, has_reference, has_teacher
from miles_train.needs import needs_old_log_probs_first
from miles_train.objective_check import check_objective
from miles_train.options import ObjectiveOptions
from miles_train.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from miles_api.args import Args
    from miles_api.config import RunConfig
    from miles_api.loading.bind import BoundHook

__all__ = [
    "TRAIN_HOOKS",
    "HookCalls",
    "TrainHooks",
    "check_train_hooks",
    "idle_train_hooks",
    "origin_of_columns",
    "reads_log_probs",
    "recomputes_log_probs",
]

TRAIN_HOOKS = (
    "rollout_data_postprocess",
    "advantage",
    "loss",
    "importance_weights",
    "pg_loss_reducer",
    "megatron_init",
    "before_log_prob",
    "before_train_step",
    "post_save",
    "model_provider",
)
"""The hooks that this package calls, all of them on trainer ranks."""


class HookCalls:
    """Bound hooks and how they are called.

    Every call goes through `call`, and what a hook returns wrongly through `wrong`, so that the error names the hook,
    the rollout and the step.
    """

    def __init__(self, args: Args, bound: Mapping[str, list[BoundHook]]) -> None:
        self.args = args
        self.where = ""
        """What the rank is doing, for errors: ` in rollout 3, step 1`."""
        self.parallel = Parallel()
        """This rank's place; set when the process groups exist."""
        self._bound = bound

    def one(self, name: str) -> BoundHook | None:
        """Return the hook configured under `name`, if there is one."""
        return next(iter(self.many(name)), None)

    def many(self, name: str) -> list[BoundHook]:
        """Return all hooks configured under `name`, in order."""
        return self._bound.get(name, [])

    def call(self, hook: BoundHook, *args: Any, **keywords: Any) -> Any:
        """Call a hook; its exception passes on, with a note of where training was.

        Raises:
            HookResultError: it returned a coroutine or generator, as a plain decorator around an `async def` does.
        """
        try:
            result = hook(*args, **keywords)
        except Exception as error:
            if self.where:
                error.add_note(f"on trainer rank{self._rank()}{self.where}")
            raise
        if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
            if inspect.iscoroutine(result):
                result.close()
            raise self.wrong(hook, f"it returned a {type(result).__name__} that never ran: return its result")
        return result

    def call_each(self, name: str, *args: Any) -> None:
        """Call every hook configured under `name`, for those that return nothing."""
        for hook in self.many(name):
            self.call(hook, *args)

    def skip(self, *names: str) -> None:
        """Note that the moment of these hooks came with nothing for them to do."""
        for hook in (hook for name in names for hook in self.many(name)):
            hook.stats.skipped += 1

    def wrong(self, hook: BoundHook, problem: str) -> HookResultError:
        """Return the error for a result that the hook's signature does not allow."""
        hook.stats.errors += 1
        return HookResultError(f"{self.named(hook)}{self.where}: {problem}")

    @staticmethod
    def named(hook: BoundHook) -> str:
        """Return how errors name a hook."""
        return f"the {hook.spec.name} hook {hook.reference}"

    @contextmanager
    def during(self, where: str) -> Iterator[None]:
        """Say where training is, for the errors of hooks called inside the block."""
        before, self.where = self.where, self.where + where
        try:
            yield
        finally:
            self.where = before

    def _rank(self) -> str:
        place = [f"{n} {g.rank}" for n in ("dp", "pp", "tp") if (g := getattr(self.parallel, n)).size > 1]
        return f" ({', '.join(place)})" if place else ""


class TrainHooks(HookCalls):
    """The hooks of one trainer rank, loaded from the run's options."""

    def __init__(self, config: RunConfig) -> None:
        """Load and check the configured hooks; `ConfigError` lists every one that does not load or fit."""
        args = config.args
        self._set = HookSet(args, TRAIN_HOOKS)
        self._closed = False
        super().__init__(args, {name: self._set.many(name) for name in TRAIN_HOOKS})

    def report(self) -> list[dict[str, Any]]:
        """Say what was loaded, from where, and how it fared."""
        return self._set.report()

    def close(self) -> None:
        """Call `aclose()` or `close()` of hooks that are built from classes, once."""
        if not self._closed:
            self._closed = True
            asyncio.run(self._set.aclose())


def idle_train_hooks(config: RunConfig) -> dict[str, str]:
    """Return the train-side hooks that this run would not call, by name, with the reason."""
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    idle: dict[str, str] = {}
    if run.loss_type != "custom_loss":
        idle["loss"] = f"--loss-type is {run.loss_type}, not custom_loss"
    if run.loss_type == "sft_loss":
        idle["advantage"] = "--loss-type sft_loss has no advantages"
    if run.loss_type != "policy_loss":
        idle |= dict.fromkeys(("importance_weights", "pg_loss_reducer"), "only --loss-type policy_loss has them")
    elif not (objective.use_tis or objective.get_mismatch_metrics):
        idle["importance_weights"] = "neither --use-tis nor --get-mismatch-metrics is set"
    if run.loss_type == "value_loss":
        idle["before_train_step"] = "--loss-type value_loss trains the critic alone, and the hook is the policy's"
    if not (recomputes_log_probs(config) or has_reference(config) or has_teacher(config)):
        idle["before_log_prob"] = "this run has no pass that only computes log-probs"
    if run.debug_rollout_only:
        idle |= dict.fromkeys(TRAIN_HOOKS, "--debug-rollout-only trains nothing")
    return idle


def origin_of_columns(config: RunConfig) -> str:
    """Return for errors which hook made the columns of a rollout, if one did."""
    made_by = configured_hooks(config.args).get("convert_samples")
    return f" (its column was made by the convert_samples hook {made_by[0]})" if made_by else ""


def reads_log_probs(config: RunConfig) -> bool:
    """Say whether old log-probs of all samples must be there before the first step, for somebody who may read them."""
    run = config.group(RunOptions)
    readers = {"advantage", "rollout_data_postprocess"} & set(configured_hooks(config.args))
    if run.loss_type == "custom_loss" or run.save_debug_train_data is not None:
        return True
    return bool(readers) or needs_old_log_probs_first(config.group(ObjectiveOptions))


def recomputes_log_probs(config: RunConfig) -> bool:
    """Say whether old log-probs are recomputed, at least those of the later steps on a rollout."""
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    if run.loss_type == "sft_loss" or objective.use_rollout_logprobs:
        return False
    return (run.loss_type != "value_loss" and (run.num_steps_per_rollout or 1) > 1) or reads_log_probs(config)


def check_train_hooks(config: RunConfig) -> Iterator[str]:
    """Yield what does not fit among the objective's options and its hooks; imports no hook."""
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    configured = configured_hooks(config.args)
    if run.loss_type == "custom_loss" and "loss" not in configured:
        yield "--loss-type custom_loss needs --custom-loss-function-path"
    if run.loss_type == "value_loss" and not has_critic(config):
        yield (
            f"--loss-type value_loss trains the critic alone, and --advantage-estimator "
            f"{objective.advantage_estimator} has none: pass --advantage-estimator ppo"
        )
    corrects = objective.use_tis or objective.get_mismatch_metrics
    if corrects and run.loss_type != "policy_loss":
        flag = "--use-tis" if objective.use_tis else "--get-mismatch-metrics"
        yield f"{flag} belongs to --loss-type policy_loss; a {run.loss_type} is not corrected"
    if objective.use_tis and objective.use_rollout_logprobs and "importance_weights" not in configured:
        yield (
            "--use-tis with --use-rollout-logprobs would correct twice: the policy's ratio already compares with the "
            "engine's log-probs. Set one of them, or name your own --custom-tis-function-path"
        )
    if objective.tis_clip < objective.tis_clip_low:
        yield f"--tis-clip {objective.tis_clip} is below --tis-clip-low {objective.tis_clip_low}"
    yield from check_objective(config)
