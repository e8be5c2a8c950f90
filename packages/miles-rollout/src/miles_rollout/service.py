"""The rollout process: hooks resolved, one rollout or evaluation at a time, samples turned into columns."""

from __future__ import annotations

import asyncio
import gc
import inspect
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvloop

from miles_api.args import Args
from miles_api.batch import check_columns
from miles_api.errors import HookResultError, ServiceError
from miles_api.hookset import HookSet, close, report_of
from miles_api.rollout_types import (
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles_api.run_options import RunOptions
from miles_api.sample import Sample
from miles_rollout.evaluate import eval_metrics
from miles_rollout.group import flatten
from miles_rollout.hook_names import CALLED_BY_SERVICE
from miles_rollout.identity import require_identity
from miles_rollout.metrics import rollout_metrics

if TYPE_CHECKING:
    from miles_api.bind import BoundHook
    from miles_api.config import RunConfig

__all__ = ["RolloutWorker", "create"]


_COLLECT_AFTER = 100_000
"""Container objects allocated between two runs of the garbage collector; Python's default is 700."""


def create(config: RunConfig) -> RolloutWorker:
    """Build the rollout service of a run; the entry point `miles.services: rollout`."""
    return RolloutWorker(config)


class RolloutWorker:
    """Implements `RolloutService`; runs the rollout hook on an event loop of its own."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._shown = config.group(RunOptions).report_samples
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        # Not `Runner.run`: its signal handling prints the finished task, so the whole rollout, to no use.
        self._wait = self._runner.get_loop().run_until_complete

    def start(self, router_url: str) -> None:
        """Resolve hooks, read the prompts, build the rollout hook. `router_url` is empty when no engine runs."""
        address = urlsplit(router_url)
        where = {"sglang_router_ip": address.hostname or "", "sglang_router_port": address.port or 0}
        self._args = Args({**self._config.flat(), **where})
        self._hooks = HookSet(self._args, CALLED_BY_SERVICE)
        self._source_args = self._args.fork()
        self._data_source = self._hooks.need("data_source").target(self._source_args)
        self._rollout = self._ready(self._hooks.need("rollout"))
        eval_hook = self._hooks.one("eval_rollout")
        if eval_hook is None or eval_hook.reference == self._rollout.reference:
            self._eval = self._rollout
        else:
            self._eval = self._ready(eval_hook)
        # What is loaded by now stays, and requests leave few cycles: the default collector took a fifth of a rollout.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)

    def _ready(self, hook: BoundHook) -> BoundHook:
        """Build the class form, once."""
        if not hook.constructs:
            return hook
        return hook.built(RolloutFnConstructorInput(args=hook.view or self._args, data_source=self._data_source))

    def _call(self, hook: BoundHook, request: RolloutFnTrainInput | RolloutFnEvalInput) -> Any:
        if isinstance(hook.form.stub, type):
            arguments: tuple[Any, ...] = (request,)
        else:
            arguments = (self._args, request.rollout_id, self._data_source, request.evaluation)
        return self._run(hook, *arguments)

    def _run(self, hook: BoundHook, *arguments: Any) -> Any:
        """Call a hook of either colour and wait for it."""
        if hook.is_async:
            return self._wait(hook.acall(None, *arguments))
        result = hook(*arguments)
        return self._wait(_awaited(result)) if inspect.isawaitable(result) else result

    def generate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Produce one rollout and its columns."""
        started = time.perf_counter()
        request = RolloutFnTrainInput(rollout_id=rollout_id, weight_version=weight_version)
        output = self._call(self._rollout, request)
        if isinstance(output, list):
            output = RolloutFnTrainOutput(samples=output)
        self._require_groups(output)
        generated = time.perf_counter()
        for hook in self._hooks.many("sample_filter"):
            self._run(hook, self._args, output.samples)
        samples = sorted(flatten(output.samples), key=lambda s: (s.group_index or 0, s.index or 0))
        _require_version(samples, weight_version)
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
            "samples": _shown(output.samples, self._shown),
            "seconds": seconds,
            "hooks": self.report(),
        }

    def _require_groups(self, output: Any) -> None:
        name = self._rollout.reference
        if not isinstance(output, RolloutFnTrainOutput):
            raise HookResultError(f"rollout hook {name} returned {type(output).__name__}, not RolloutFnTrainOutput")
        if not output.samples or not all(isinstance(s, Sample) for s in flatten(output.samples)):
            raise HookResultError(f"rollout hook {name} returned {len(output.samples)} groups that are not of Samples")
        require_identity(output.samples, f"rollout hook {name}")

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
        output = self._call(self._eval, request)
        if isinstance(output, dict):
            output = RolloutFnEvalOutput(data=output)
        if not isinstance(output, RolloutFnEvalOutput):
            raise HookResultError(
                f"eval_rollout hook {self._eval.reference} returned {type(output).__name__}, not RolloutFnEvalOutput"
            )
        log = self._hooks.one("eval_rollout_log")
        silent = log is not None and log(rollout_id, self._args, output.data, output.metrics) is True
        samples = [s for part in output.data.values() for s in part["samples"]]
        metrics = {} if silent else {**eval_metrics(output.data), **output.metrics}
        shown = _shown([[s] for s in samples], self._shown)
        return {"metrics": metrics, "samples": shown, "hooks": self.report()}

    def save(self, rollout_id: int, directory: str) -> None:
        """Write the data source's state to a staging directory."""
        self._source_args.save = directory
        self._data_source.save(rollout_id)

    def load(self, rollout_id: int, directory: str) -> None:
        """Restore the data source's state."""
        self._source_args.load = directory
        self._data_source.load(rollout_id)

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks this process has and how they fared, for `hooks.json`."""
        built = {hook.spec.name: hook for hook in (self._eval, self._rollout)}
        own = [report_of(built[hook["hook"]]) if hook["hook"] in built else hook for hook in self._hooks.report()]
        # The default rollout and data source call hooks of their own.
        inner = [getattr(part, "report", list)() for part in (self._data_source, self._rollout.target)]
        return [*own, *inner[0], *inner[1]]

    def stop(self) -> None:
        """Close the rollout hook and every other hook that can be closed."""
        for target in (self._rollout.target, self._eval.target)[: 1 if self._eval is self._rollout else 2]:
            self._wait(close(target))
        self._wait(self._hooks.aclose())
        self._runner.close()


async def _awaited(result: Any) -> Any:
    return await result


def _require_version(samples: list[Sample], weight_version: str) -> None:
    """Refuse samples of other weights than those that were sent: the engines and the trainer would disagree."""
    for sample in samples:
        if any(version != weight_version for version in sample.weight_versions):
            raise ServiceError(
                f"sample {sample.index} was generated by weights {sample.weight_versions}, not {weight_version!r}: "
                "an engine did not take the last update"
            )


def _shown(groups: list[Group], count: int) -> list[dict[str, Any]]:
    """Return a few groups, as plain values, for the report's sample browser."""
    fields = ("group_index", "index", "prompt", "response", "label", "reward", "status", "response_length")
    return [{field: getattr(s, field) for field in fields} for s in flatten(groups[:count])]
