"""The models of one trainer rank: the policy, and those that its objective needs beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from miles_api.errors import ConfigError, DataError
from miles_api.run_options import RunOptions
from miles_train.megatron.critic import build_critic
from miles_train.megatron.model import build_frozen_model, build_model
from miles_train.megatron.offload import Lender
from miles_train.megatron.optimizer import build_optimizer
from miles_train.models_check import critic_options, model_directories
from miles_train.options import ModelsOptions, OptimizerOptions, ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn import Module

    from miles_api.config import RunConfig
    from miles_train.megatron.core import DistributedDataParallel
    from miles_train.megatron.optimizer import Optimizer

__all__ = ["Models", "Trained", "build_models"]


class Trained(NamedTuple):
    """A model that is trained, with its optimizer."""

    model: list[DistributedDataParallel]
    optimizer: Optimizer


class Models(NamedTuple):
    """What one rank holds of each model; a model that the objective does not need is None."""

    policy: Trained
    critic: Trained | None = None
    reference: list[Module] | None = None
    teacher: list[Module] | None = None

    def lender(self) -> Lender:
        """Return what moves all of them to host memory and back."""
        trained = [one for one in (self.policy, self.critic) if one is not None]
        critic = self.critic.model if self.critic else []
        others: list[Sequence[Module]] = [critic, self.reference or [], self.teacher or []]
        return Lender(self.policy.model, others, [one.optimizer for one in trained])


def build_models(config: RunConfig, provider: Callable[..., Any] | None) -> Models:
    """Build the models that a run needs, all with the policy's parallel sizes, and load their weights.

    Called once, after `init.initialize`. `provider` is the `model_provider` hook without its `args`; it builds the
    teacher too. The policy's directory must be set, and the batch sizes derived.

    Raises:
        ConfigError: a model that cannot be built or divided over the ranks; the flag that names it comes first.
        DataError: a directory lacks weights.
        HookResultError: the provider returned no GPTModel.
    """
    run, parallel = config.group(RunOptions), config.group(ParallelOptions)
    directories = model_directories(config)
    policy, critic = config.group(OptimizerOptions), critic_options(config)
    steps, alone = run.num_steps_per_rollout or 1, config.group(ModelsOptions).num_critic_only_steps

    def build(kind: Callable[..., list[Any]], role: str) -> list[Any]:
        flag, directory = directories[role]
        try:
            return kind(directory, parallel, provider=provider)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{flag}: {error}") from error

    def train(kind: Callable[..., list[Any]], role: str, options: OptimizerOptions, rollouts: int) -> Trained:
        model = build(kind, role)
        return Trained(model, build_optimizer(model, options, parallel, total_steps=rollouts * steps))

    return Models(
        train(build_model, "policy", policy, run.num_rollout - alone),
        train(build_critic, "critic", critic, run.num_rollout) if "critic" in directories else None,
        build(build_frozen_model, "reference") if "reference" in directories else None,
        build(build_frozen_model, "teacher") if "teacher" in directories else None,
    )
