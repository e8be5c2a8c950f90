"""What a running rollout shares among its generations: tokenizer, hooks, the connection to the router."""

from __future__ import annotations

import asyncio
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import HookSet, configured_hooks
from miles_api.options import options_from
from miles_api.sample import Sample
from miles_rollout import running
from miles_rollout.failures import Guard
from miles_rollout.interrupts import Interrupts
from miles_rollout.joint import JointRequests
from miles_rollout.options import EngineFleetOptions, EvalOptions, RewardOptions, RolloutOptions
from miles_rollout.requests import Requests
from miles_rollout.rewards.pool import close_pools, take_counts
from miles_rollout.rewards.remote import close_remote, take_remote_metrics
from miles_rollout.tokenizers import load_prompt_tokenizer, load_tokenizer
from miles_rollout.watchdog import Watchdog

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook
    from miles_api.rollout_types import Group

__all__ = ["Slots", "State"]

_SEES_SAMPLES = ("generate", "reward", "group_reward", "dynamic_filter")

_depth: ContextVar[int] = ContextVar("slots taken by this call", default=0)


class Slots(asyncio.Semaphore):
    """A semaphore that a call which has a slot enters again at once, in tasks that it starts too.

    The loop holds a slot around each generate hook, and hooks written for other stacks take one themselves.
    """

    waiting = 0
    """How many calls wait for a slot."""

    async def acquire(self) -> Literal[True]:
        """Wait for a slot, unless this call has one."""
        depth = _depth.get()
        if depth == 0:
            self.waiting += 1
            try:
                await super().acquire()
            finally:
                self.waiting -= 1
        _depth.set(depth + 1)
        return True

    def release(self) -> None:
        """Give the slot back, once for each time it was taken."""
        depth = _depth.get()
        if depth > 0:
            _depth.set(depth - 1)
        if depth <= 1:
            super().release()


class State:
    """The `GenerateState` of the default loop; lives in one event loop."""

    def __init__(self, args: Args, hooks: HookSet) -> None:
        self.args = args
        self.hooks = hooks
        self.prompt_tokenizer = load_prompt_tokenizer(args.hf_checkpoint)
        self.processor = None
        self.aborted = False
        self.rewards: RewardOptions = options_from(args, RewardOptions)
        self.options: RolloutOptions = options_from(args, RolloutOptions)
        fleet: EngineFleetOptions = options_from(args, EngineFleetOptions)
        self.concurrency = self.options.sglang_server_concurrency * fleet.rollout_num_engines
        self.guard = Guard(args)
        self.watchdog = Watchdog(self.guard.options.hook_timeout)
        self._shows_all: bool | None = None
        self._own: dict[tuple[str, str], HookSet] = {}
        self._eval_key = self.rewards.eval_reward_key or self.rewards.reward_key
        self.sampling_params = _sampling_params(self.options, args.rollout_temperature)
        self.eval_sampling_params = _eval_params(self.sampling_params, options_from(args, EvalOptions))
        # The option belongs to miles-router; another router may stand in its place.
        token = args.router_token if "router_token" in args else None
        self.requests = Requests(
            f"http://{args.sglang_router_ip}:{args.sglang_router_port}",
            {"Authorization": f"Bearer {token}"} if token else {},
            self.options.generate_timeout,
            self.concurrency,
        )
        self.interrupts = Interrupts(self.requests) if self.options.partial_rollout else None
        """Ends generations before they are done; None where they start anew."""
        self.joint = JointRequests(self.post, self._may_join, fleet.rollout_num_engines)
        if "generate" in configured_hooks(args) or self.interrupts:
            # It is given this state, or a text is put together of parts. Loaded when first asked for, the tokenizer
            # would hold up all generations.
            _ = self.tokenizer

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, for hooks; it takes seconds to import, and our own defaults do without."""
        return load_tokenizer(self.args.hf_checkpoint)

    @functools.cached_property
    def generate_fn_semaphore(self) -> Slots:
        """Bounds how many generations run at once, over all engines."""
        # Every generation starts here, inside the event loop: hooks of older stacks ask for this loop's state.
        running.claim(self)
        return Slots(self.concurrency)

    def _may_join(self) -> bool:
        """Say whether samples may share a request: nobody waits for a slot, and no middleware expects them alone."""
        # The option belongs to miles-router, like its token.
        alone = "miles_router_middleware_paths" in self.args and self.args.miles_router_middleware_paths
        return not alone and self.generate_fn_semaphore.waiting == 0

    def scores_groups(self, evaluation: bool) -> bool:
        """Say whether whole groups are scored, by the group reward."""
        return self.rewards.eval_group_rm if evaluation else self.rewards.group_rm

    def reward_key(self, evaluation: bool) -> str | None:
        """Return which entry of a dict reward counts."""
        return self._eval_key if evaluation else self.rewards.reward_key

    def shows(self, group: Group) -> bool:
        """Say whether other code than our own defaults gets to see the samples of `group` before they are kept."""
        if self._shows_all is None:
            hooks = [hook for name in _SEES_SAMPLES for hook in self.hooks.many(name)]
            self._shows_all = any(hook.configured for hook in hooks)
        if self._shows_all:
            return True
        # What was begun before has to be kept as it was.
        return any(
            not isinstance(sample, Sample)
            or sample.generate_function_path is not None
            or sample.custom_rm_path is not None
            or sample.response_length > 0
            for sample in group
        )

    def own_hook(self, name: str, reference: str) -> BoundHook:
        """Return the hook that a sample names for itself, resolved like the run's own, once for each reference."""
        if (name, reference) not in self._own:
            view = self.args.fork()
            setattr(view, str(REGISTRY[name].field), reference)
            # One flag serves two hooks; a sample's own reward scores that sample.
            view.group_rm = False
            self._own[name, reference] = HookSet(view, [name])
            self.watchdog.add(self._own[name, reference].many(name))
        return self._own[name, reference].need(name)

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks ran, those that samples named and those that are parts of a reward included."""
        parts = [getattr(hook.target, "report_parts", list)() for hook in self.hooks.many("reward")]
        all_lines = [*(hooks.report() for hooks in (self.hooks, *self._own.values())), *parts]
        return [line for lines in all_lines for line in lines]

    def hook_metrics(self) -> dict[str, float]:
        """Return what went badly since the last call: hooks that block, hooks that hang, requests sent again."""
        metrics = {f"hooks/{name}/blocked": float(n) for name, n in self.watchdog.blocked.items()}
        self.watchdog.blocked.clear()
        counts = {"hooks/hung_threads": self.guard.hung(), "rollout/request_retries": self.requests.take_repeated()}
        counts |= {f"rollout/rm_{what}": count for what, count in take_counts().items()}
        return metrics | {name: float(count) for name, count in counts.items() if count} | take_remote_metrics()

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """POST JSON to the router and return the decoded answer.

        What nobody served is sent again within `--generate-timeout`. Once a rollout has enough, with
        `--partial-rollout`, a generation is answered as aborted. Raises `ServiceError` with status and body when it
        is refused, and with what was tried when the time is up.
        """
        if self.interrupts is None:
            return await self.requests.post(path, payload)
        if self.aborted and (refusal := self.interrupts.refusal(path, payload)) is not None:
            return refusal
        with self.interrupts.named(path, payload) as body:
            return await self.requests.post(path, body)

    async def close(self) -> None:
        """Close the connections, the hook threads, the grading processes, and hooks that can be closed."""
        for hooks in (self.hooks, *self._own.values()):
            await hooks.aclose()
        await close_remote()
        close_pools()
        await self.requests.close()
        self.guard.close()


def _sampling_params(options: RolloutOptions, temperature: float) -> dict[str, Any]:
    params: dict[str, Any] = {
        "temperature": temperature,
        "top_p": options.rollout_top_p,
        "top_k": options.rollout_top_k,
        "max_new_tokens": options.rollout_max_response_len,
        "skip_special_tokens": options.rollout_skip_special_tokens,
    }
    if options.rollout_stop:
        params["stop"] = list(options.rollout_stop)
    if options.rollout_stop_token_ids:
        params["stop_token_ids"] = list(options.rollout_stop_token_ids)
    return params


def _eval_params(training: dict[str, Any], options: EvalOptions) -> dict[str, Any]:
    params = {**training, "temperature": options.eval_temperature, "top_p": options.eval_top_p, "top_k": -1}
    if options.eval_max_response_len is not None:
        params["max_new_tokens"] = options.eval_max_response_len
    return params
