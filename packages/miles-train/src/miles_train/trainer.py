"""One trainer rank: from a rollout's columns to updated weights. Plain Python; the driver wraps it in a Ray actor."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from miles_api.errors import ConfigError, DataError, ServiceError
from miles_api.run_options import RunOptions
from miles_train import probe
from miles_train.learner import Learner
from miles_train.megatron import checkpoint, hf, init
from miles_train.models import build_models
from miles_train.options import ParallelOptions
from miles_train.train_hooks import TrainHooks
from miles_train.train_record import TrainRecorder
from miles_train.weight_sync.sender import Sender

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_api.services import TrainStepReport
    from miles_train.megatron.core import DistributedDataParallel
    from miles_train.megatron.offload import Lender
    from miles_train.models import Models
    from miles_train.weight_sync.plan import Plan, Sent

__all__ = ["Trainer"]

_AWAY = "the trainer's models are in host memory: they come back with onload"


class Trainer:
    """Implements `miles_api.services.TrainService` for one rank of the trainer."""

    def __init__(
        self,
        config: RunConfig,
        *,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        local_rank: int = 0,
        listen_fd: int | None = None,
        timeout: float = 1800.0,
    ) -> None:
        """Read the options and load the hooks; nothing starts before `start`.

        The batch sizes in `config` must all be derived. Raises `ConfigError` for hooks that do not load or fit, and
        for an objective that contradicts itself.
        """
        self._run = config.group(RunOptions)
        self._parallel = config.group(ParallelOptions)
        self._config = config
        self._place = {
            "rank": rank,
            "world_size": world_size,
            "master_addr": master_addr,
            "master_port": master_port,
            "local_rank": local_rank,
            "listen_fd": listen_fd,
            "timeout": timeout,
        }
        self._hooks = TrainHooks(config)
        self._recorder = TrainRecorder(config)
        self._learner = Learner(config, self._hooks, self._recorder)
        self._models: Models | None = None
        self._sender = Sender()
        self._sent_as: str | None = None
        """By which version the engines know the weights of now; None once they have been trained."""
        self._lender: Lender | None = None

    def start(self) -> None:
        """Initialise the process groups, load the models and build the optimizers."""
        self._hf_checkpoint()
        init.initialize(self._parallel, seed=self._run.seed, **self._place)
        hooks = self._hooks
        hooks.parallel = init.parallel()
        hooks.call_each("megatron_init", hooks.args)
        provider = hooks.one("model_provider")
        self._models = build_models(
            self._config, partial(hooks.call, provider, args=hooks.args) if provider is not None else None
        )
        self._lender = self._models.lender()
        self._learner.attach(self._models)
        # The loaded modules stay: the collector need not look at them again in every step.
        gc.collect()
        gc.freeze()

    def train(self, rollout_id: int, batch: dict[str, Any]) -> TrainStepReport:
        """Train on one rollout; `batch` holds the whole rollout's columns, of which this rank takes its share.

        Called on every rank with the same columns; the report's metrics are the same on each. `train/loss` is averaged
        over all samples of a step, the loss's other metrics over the samples that ran; counts are totals.

        Raises:
            SampleError: the columns contradict each other, or lack one that the loss needs.
            HookResultError: a hook's result does not fit.
            MilesError: NaN or infinity in rewards, log-probs, advantages, loss or gradients.
        """
        self._started()
        self._sent_as = None
        return self._learner.train(rollout_id, batch)

    def export(self, directory: str, weights_only: bool = False, checksums: bool = False) -> dict[str, str]:
        """Write the current weights as a Hugging Face directory, with the tokenizer unless `weights_only`.

        Every rank calls it. With `checksums` the result holds the hashes of the tensors that this rank wrote, as
        `miles_api.checksum` defines them, else nothing. Raises DataError when the directory cannot be written.
        """
        source, extra = self._hf_checkpoint(), not weights_only
        try:
            return hf.export_hf(self._model, source, directory, extra_files=extra, with_checksums=checksums)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{directory} cannot be written: {error}") from error

    def send_weights(self, plan: Plan) -> Sent:
        """Send the current weights to engines that have opened a session for them; every rank calls it.

        The result holds what this rank sent: hashes, if asked for, and engines that died or refused.
        """
        sent = self._sender.send(self._model, plan)
        self._sent_as = plan.version
        return sent

    def snapshot(self, directory: str, version: str) -> bool:
        """Export like `export`, if the weights are still those that were sent as `version`; say whether they are.

        For an engine that starts anew while the run goes on; every rank calls it, and all give the same answer.
        """
        if self._sent_as != version:
            return False
        with self._lending().with_weights():
            self.export(directory, weights_only=True)
        return True

    def score(self, tokens: list[list[int]]) -> list[list[float]]:
        """Return for each sequence the log-probs of its tokens after the first, at temperature 1; trains nothing.

        Every rank calls it with the same sequences; pipeline stages before the last return an empty list.
        """
        return probe.score(self._model, tokens)

    def save(self, rollout_id: int, directory: str) -> None:  # noqa: ARG002  the directory already belongs to it
        """Write weights, optimizer, schedule and random states into `directory`, new or empty; every rank calls it.

        Those of the critic are among them; the models that are not trained are not.

        Raises DataError when the directory cannot be written.
        """
        models = self._started()
        checkpoint.save(*models.policy, directory, critic=models.critic)

    def saved(self, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
        """Call the post-save hook, on rank 0: the checkpoint was renamed into place. Every rank calls it."""
        self._started()
        if init.is_first_rank():
            with self._hooks.during(f" after the checkpoint of rollout {rollout_id}"):
                self._hooks.call_each("post_save", self._hooks.args, rollout_id, checkpoint_dir, hf_checkpoint_dir)

    def load(self, rollout_id: int, directory: str) -> None:
        """Continue from what `save` wrote to `directory`; every rank calls it, after `start`.

        Without `--load-optim` the optimizer and its schedule begin anew on the loaded weights, without `--load-rng` the
        random states do. What was recorded of rollouts after `rollout_id` is cut. Raises DataError for a checkpoint
        that is missing, does not fit this model or these ranks, or lacks the critic that this run has.
        """
        models = self._started()
        checkpoint.load(
            *models.policy,
            directory,
            critic=models.critic,
            with_optimizer=self._run.load_optim,
            with_rng=self._run.load_rng,
        )
        self._recorder.continue_after(rollout_id)

    def offload(self, keep_weights: bool = False) -> dict[str, float]:
        """Move models and optimizers to host memory, but for the policy's weights with `keep_weights`.

        Called on every rank between two rollouts; until `onload` this rank trains, saves and loads nothing, and exports
        and scores only while it has the weights. Returns the bytes it moved and the seconds it took.
        """
        return self._lending().lend(keep_weights=keep_weights)

    def onload(self) -> dict[str, float]:
        """Bring back what `offload` moved, bit for bit; returns bytes and seconds."""
        return self._lending().take_back()

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks this rank has, from where, and how they fared.

        Hooks that only the last pipeline stage or rank 0 calls were called nowhere else: add up the ranks' counts.
        """
        return self._hooks.report()

    def stop(self) -> None:
        """Leave the process groups, drop the model and close hooks and records; safe to call twice."""
        self._models = self._lender = None
        self._sender.close()
        self._learner.attach(None)
        self._recorder.close()
        self._hooks.close()
        init.shutdown()
        # What `start` kept from the collector may go.
        gc.unfreeze()

    def _hf_checkpoint(self) -> str:
        if self._run.hf_checkpoint is None:
            raise ConfigError("--hf-checkpoint is needed to train: it holds the model's config and first weights")
        return self._run.hf_checkpoint

    @property
    def _model(self) -> list[DistributedDataParallel]:
        """The policy, whose weights are here."""
        if not self._lending().weights_here:
            raise ServiceError(_AWAY)
        assert self._models is not None
        return self._models.policy.model

    def _started(self) -> Models:
        if not self._lending().all_here:
            raise ServiceError(_AWAY)
        assert self._models is not None
        return self._models

    def _lending(self) -> Lender:
        if self._lender is None:
            raise ServiceError("the trainer is not started")
        return self._lender
