"""The rollout process: hooks resolved, one rollout or evaluation at a time, samples turned into columns."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvloop

from miles_api.args import Args
from miles_api.batch import check_columns
from miles_api.errors import HookResultError
from miles_api.hookset import HookSet
from miles_api.rollout_types import (
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles_api.sample import Sample
from miles_rollout.evaluate import eval_metrics
from miles_rollout.group import flatten
from miles_rollout.hook_names import CALLED
from miles_rollout.metrics import rollout_metrics

if TYPE_CHECKING:
    from miles_api.config import RunConfig

__all__ = ["RolloutWorker", "create"]


def create(config: RunConfig) -> RolloutWorker:
    """Build the rollout service of a run; the entry point `miles.services: rollout`."""
    return RolloutWorker(config)


class RolloutWorker:
    """Implements `RolloutService`; runs the rollout hook on an event loop of its own."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    def start(self, router_url: str) -> None:
        """Resolve hooks, read the prompts, build the rollout hook. `router_url` is empty when no engine runs."""
        args = self._config.args
        address = urlsplit(router_url)
        args.sglang_router_ip, args.sglang_router_port = address.hostname or "", address.port or 0
        self._args = _with_router(args)
        self._hooks = HookSet(self._args, CALLED)
        self._data_source = self._hooks.need("data_source")(self._args)
        self._rollout = self._built("rollout")
        eval_hook = self._hooks.one("eval_rollout")
        self._eval = self._built("eval_rollout") if eval_hook is not None else self._rollout

    def _built(self, name: str) -> Any:
        """Return what to call for a rollout: the class form is built once, here."""
        hook = self._hooks.need(name)
        if hook.form.name != "class":
            return hook
        return hook(RolloutFnConstructorInput(args=self._args, data_source=self._data_source))

    def _call(self, name: str, function: Any, request: RolloutFnTrainInput | RolloutFnEvalInput) -> Any:
        hook = self._hooks.one(name) or self._hooks.need("rollout")
        if hook.form.name == "class":
            result = function(request)
        else:
            result = function(self._args, request.rollout_id, self._data_source, request.evaluation)
        return self._runner.run(_awaited(result)) if inspect.isawaitable(result) else result

    def generate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Produce one rollout and its columns."""
        started = time.perf_counter()
        request = RolloutFnTrainInput(rollout_id=rollout_id, weight_version=weight_version)
        output = self._call("rollout", self._rollout, request)
        if isinstance(output, list):
            output = RolloutFnTrainOutput(samples=output)
        self._require_groups(output)
        generated = time.perf_counter()
        for hook in self._hooks.many("sample_filter"):
            self._run(hook, output.samples)
        samples = sorted(flatten(output.samples), key=lambda s: (s.group_index or 0, s.index or 0))
        batch = self._columns(samples)
        metrics = {**rollout_metrics(self._args, samples), **output.metrics}
        seconds = {"generate": generated - started, "convert": time.perf_counter() - generated}
        suppressed = [
            hook(rollout_id, self._args, samples, output.metrics, seconds["generate"])
            for hook in self._hooks.many("rollout_log")
        ]
        return {
            "batch": batch,
            "metrics": {} if any(value is True for value in suppressed) else metrics,
            "samples": _shown(output.samples, self._args.report_samples),
            "seconds": seconds,
        }

    def _run(self, hook: Any, groups: list[Group]) -> None:
        result = hook(self._args, groups)
        if inspect.isawaitable(result):
            self._runner.run(_awaited(result))

    def _require_groups(self, output: Any) -> None:
        name = self._hooks.need("rollout").reference
        if not isinstance(output, RolloutFnTrainOutput):
            raise HookResultError(f"rollout hook {name} returned {type(output).__name__}, not RolloutFnTrainOutput")
        if not output.samples or not all(isinstance(s, Sample) for s in flatten(output.samples)):
            raise HookResultError(f"rollout hook {name} returned {len(output.samples)} groups that are not of Samples")

    def _columns(self, samples: list[Sample]) -> dict[str, Any]:
        raw, rewards = self._hooks.need("reward_post_process")(self._args, samples)
        if len(raw) != len(samples) or len(rewards) != len(samples):
            raise HookResultError(
                f"reward_post_process returned {len(raw)} and {len(rewards)} rewards for {len(samples)} samples"
            )
        convert = self._hooks.need("convert_samples")
        batch = convert(self._args, samples, raw_rewards=list(raw), rewards=list(rewards))
        check_columns(batch)
        return batch

    def evaluate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Run the evaluation hook and return its metrics."""
        request = RolloutFnEvalInput(rollout_id=rollout_id, weight_version=weight_version)
        output = self._call("eval_rollout", self._eval, request)
        if isinstance(output, dict):
            output = RolloutFnEvalOutput(data=output)
        log = self._hooks.one("eval_rollout_log")
        silent = log is not None and log(rollout_id, self._args, output.data, output.metrics) is True
        samples = [s for part in output.data.values() for s in part["samples"]]
        metrics = {} if silent else {**eval_metrics(output.data), **output.metrics}
        return {"metrics": metrics, "samples": _shown([[s] for s in samples], self._args.report_samples)}

    def save(self, rollout_id: int, directory: str) -> None:
        """Write the data source's state to a staging directory."""
        self._args.save = directory
        self._data_source.save(rollout_id)

    def load(self, rollout_id: int, directory: str) -> None:
        """Restore the data source's state."""
        self._args.load = directory
        self._data_source.load(rollout_id)

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks ran, for `hooks.json`."""
        own = getattr(self._rollout, "report", list)()
        return [*self._hooks.report(), *own] if own else self._hooks.report()

    def stop(self) -> None:
        """Close what the rollout hook holds open."""
        close = getattr(self._rollout, "aclose", None)
        if close is not None:
            self._runner.run(close())
        self._runner.close()


def _with_router(args: Args) -> Args:
    """Fold the router's address into the options, so that every hook's own view shows it."""
    return Args({name: getattr(args, name) for name in args})


async def _awaited(result: Any) -> Any:
    return await result


def _shown(groups: list[Group], count: int) -> list[dict[str, Any]]:
    """Return a few groups, as plain values, for the report's sample browser."""
    fields = ("group_index", "index", "prompt", "response", "label", "reward", "status", "response_length")
    return [{field: getattr(s, field) for field in fields} for s in flatten(groups[:count])]
