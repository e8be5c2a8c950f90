"""`GenerateState(args)` and the functions around it, on top of the rollout that runs in this process."""

from __future__ import annotations

import asyncio
import copy
import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from miles_api.compat.functions import run
from miles_api.loading.hookset import HookSet
from miles_api.rollout_types import (
    GenerateFnInput,
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles_rollout import running
from miles_rollout.evaluate import evaluate
from miles_rollout.failures import HookFailed
from miles_rollout.generate import single_turn
from miles_rollout.group import run_group
from miles_rollout.hook_names import CALLED_BY_LOOP
from miles_rollout.loop import InferenceRollout
from miles_rollout.pristine import copy_group
from miles_rollout.state import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = [
    "GenerateState",
    "compute_sampling_params",
    "eval_rollout",
    "generate",
    "generate_and_rm",
    "generate_and_rm_group",
    "generate_rollout",
    "state_generate_and_rm",
    "state_generate_and_rm_group",
    "state_of",
]

_idle: list[State] = []
"""At most one state that was built outside any event loop and waits for the first loop that needs one."""


def state_of(args: Args) -> State:
    """Return the state of the running event loop, building one where the rollout hook runs loops of its own.

    Outside a loop it is the newest one: good for its tokenizer and sampling parameters.
    """
    found = _of_this_run(args, running.of_this_loop())
    if found is not None:
        return found
    if not running.in_a_loop():
        known = _of_this_run(args, running.newest(), *_idle)
        if known is None:
            known = _build(args)
            _idle[:] = [known]
        return known
    state = _of_this_run(args, *_idle) or _build(args)
    _idle.clear()
    running.claim(state)
    _at_the_end_of_this_loop(functools.partial(_disconnect, state))
    return state


async def _disconnect(state: State) -> None:
    """Close what belongs to one event loop; the hooks serve the next one."""
    await state.requests.close()
    state.guard.close()


_kept: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Any]] = WeakKeyDictionary()


def _at_the_end_of_this_loop(close: Callable[[], Awaitable[None]]) -> None:
    """Call `close` when the running loop shuts its asynchronous generators down, as `asyncio.run` does last."""

    async def keeper() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await close()

    generator = keeper()
    started = asyncio.ensure_future(anext(generator))
    _kept.setdefault(asyncio.get_running_loop(), []).extend((generator, started))


def _build(args: Args) -> State:
    newest = _of_this_run(args, running.newest())
    return State(args, newest.hooks if newest is not None else HookSet(args, CALLED_BY_LOOP))


def _of_this_run(args: Args, *states: State | None) -> State | None:
    """Return the first state with the router and the model of `args`."""
    names = ("sglang_router_ip", "sglang_router_port", "hf_checkpoint")
    wanted = [getattr(args, name) for name in names]
    return next((s for s in states if s is not None and [getattr(s.args, name) for name in names] == wanted), None)


class GenerateState:
    """What the older stacks build from `args` and share between generations; here a view of the running state.

    `tokenizer`, `processor`, `sampling_params`, `args` and whatever else a state has are the running one's.
    """

    _facades: WeakKeyDictionary[State, GenerateState] = WeakKeyDictionary()
    _state: State
    pendings: set[asyncio.Task[Any]]
    remaining_batch_size: int

    def __new__(cls, args: Args) -> GenerateState:
        """Return the one for the running state: every call gives the same, as a singleton did."""
        state = state_of(args)
        if state not in cls._facades:
            facade = super().__new__(cls)
            facade._state = state
            facade.pendings, facade.remaining_batch_size = set(), 0
            cls._facades[state] = facade
        return cls._facades[state]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_state":
            raise AttributeError(name)
        return getattr(self._state, name)

    @property
    def semaphore(self) -> asyncio.Semaphore:
        """Bounds how many generations run at once; the default loop holds it around each generate hook."""
        return self._state.generate_fn_semaphore

    @property
    def aborted(self) -> bool:
        """Whether the rollout stops."""
        return self._state.aborted

    @aborted.setter
    def aborted(self, value: bool) -> None:
        self._state.aborted = value

    def reset(self) -> None:
        """Forget what is under way, for the next rollout."""
        self.pendings, self.remaining_batch_size = set(), 0
        self._state.aborted = False

    def submit_generate_tasks(self, samples: list[Group]) -> None:
        """Start the generation and scoring of groups as tasks in `pendings`."""
        for group in samples:
            self.pendings.add(asyncio.create_task(generate_and_rm_group(self.args, group, dict(self.sampling_params))))
        self.remaining_batch_size += len(samples)

    @contextmanager
    def dp_rank_context(self) -> Iterator[int]:
        """Yield a data-parallel rank: the router balances, so always 0."""
        yield 0


async def generate(args: Args, sample: Sample, sampling_params: dict[str, Any]) -> Sample | list[Sample]:
    """Generate one answer to a sample's prompt, as without a generate hook."""
    request = GenerateFnInput(state=state_of(args), sample=sample, sampling_params=sampling_params, args=args)
    return (await single_turn.generate(request)).samples


async def generate_and_rm_group(
    args: Args, group: Group, sampling_params: dict[str, Any], evaluation: bool = False
) -> Group:
    """Generate and score a group with the run's hooks; what a hook raises for good is raised here."""
    return await state_generate_and_rm_group(state_of(args), group, sampling_params, evaluation)


async def generate_and_rm(
    args: Args, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """Generate and score one sample with the run's hooks."""
    return (await generate_and_rm_group(args, [sample], sampling_params, evaluation))[0]


async def state_generate_and_rm(
    state: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample | list[Sample]:
    """As `generate_and_rm`, in the form that takes the state."""
    return (await state_generate_and_rm_group(state, [sample], sampling_params, evaluation))[0]


async def state_generate_and_rm_group(
    state: Any, group: Group, sampling_params: dict[str, Any], evaluation: bool = False
) -> Group:
    """As `generate_and_rm_group`, in the form that takes the state."""
    real = state._state if isinstance(state, GenerateState) else state
    variant = _with_sampling_params(real, sampling_params)
    try:
        return await run_group(variant, group, copy_group(group), evaluation=evaluation)
    except HookFailed as failure:
        raise failure.error from None


def _with_sampling_params(state: State, sampling_params: dict[str, Any]) -> State:
    """Return a state that samples with these parameters and shares everything else."""
    # Built on first use: the copy must not make one of its own.
    _ = state.generate_fn_semaphore
    variant = copy.copy(state)
    variant.sampling_params = variant.eval_sampling_params = sampling_params
    return variant


async def eval_rollout(args: Args, rollout_id: int) -> tuple[RolloutFnEvalOutput, list[Group]]:
    """Evaluate on the run's held-out prompts; the second part is empty."""
    return await evaluate(state_of(args)), []


_rollouts: WeakKeyDictionary[Any, InferenceRollout] = WeakKeyDictionary()


def generate_rollout(
    args: Args, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Produce a rollout or an evaluation as the default rollout does; for rollout hooks that build on it."""
    kind = RolloutFnEvalInput if evaluation else RolloutFnTrainInput
    return run(_default_rollout(args, data_source, kind(rollout_id=rollout_id)))


async def _default_rollout(
    args: Args, data_source: Any, request: RolloutFnTrainInput | RolloutFnEvalInput
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    if data_source not in _rollouts:
        rollout = InferenceRollout(RolloutFnConstructorInput(args=args, data_source=data_source))
        _at_the_end_of_this_loop(rollout.aclose)
        _rollouts[data_source] = rollout
    return await _rollouts[data_source](request)


def compute_sampling_params(
    args: Args, *, temperature: float, top_p: float, top_k: int, max_new_tokens: int
) -> dict[str, Any]:
    """Return the run's sampling parameters with these four set."""
    mine = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    return {**state_of(args).sampling_params, **mine}
