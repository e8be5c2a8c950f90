"""What a rollout function of your own may build on; `examples/custom_rollout` does.

Each works where the rollout hook runs, in the rollout process, from the `args` that the hook is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_rollout import evaluate as evaluation_of
from miles_rollout.compat.state import state_of
from miles_rollout.failures import HookFailed
from miles_rollout.generate.turn import sampling_seed
from miles_rollout.group import run_group
from miles_rollout.pristine import copy_group

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.rollout_types import Group, RolloutFnEvalOutput

__all__ = ["evaluate", "generate_group", "sampling_seed", "state_of"]


async def generate_group(args: Args, group: Group, *, evaluation: bool = False) -> Group:
    """Generate and score one group as the default loop does, with the run's generate and reward hooks.

    Each call of a hook gets its deadline and its second try. Raises what a hook raised for good, with the sample saved
    for `miles hooks run`: a loop that does not catch it ends the run.
    """
    state = state_of(args)
    try:
        return await run_group(state, group, copy_group(group), evaluation=evaluation)
    except HookFailed as failure:
        state.guard.stop(failure, "the rollout hook called it")


async def evaluate(args: Args) -> RolloutFnEvalOutput:
    """Generate and score `--eval-prompt-data` as the default loop does."""
    return await evaluation_of.evaluate(state_of(args))
