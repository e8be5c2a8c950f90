"""The options that more than one package reads: what a run is, how large it is, where it is written."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from miles_api.options import Options, OutputPath, UserPath

__all__ = ["RunOptions"]

_Positive = Annotated[int, msgspec.Meta(ge=1)]


class RunOptions(Options, frozen=True, kw_only=True):
    """The run as a whole."""

    hf_checkpoint: UserPath | None = None
    """Hugging Face model directory: config, tokenizer and first weights."""
    loss_type: Literal["policy_loss", "sft_loss", "value_loss", "custom_loss"] = "policy_loss"
    """What the trainer minimises. With `sft_loss` the rollout only reads data and no engine starts."""
    num_rollout: _Positive = 100
    """How many rollouts the run makes."""
    rollout_batch_size: _Positive | None = None
    """Prompts (groups) in one rollout."""
    n_samples_per_prompt: _Positive | None = None
    """Samples generated for each prompt: the size of a group."""
    global_batch_size: _Positive | None = None
    """Samples in one optimizer step."""
    num_steps_per_rollout: _Positive | None = None
    """Optimizer steps on each rollout. rollout_batch_size × n_samples_per_prompt = global_batch_size × this."""
    rollout_temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Sampling temperature; the trainer divides its logits by it before it compares log-probs."""
    seed: int = 1234
    """Seed of model initialisation and dropout."""
    deterministic: bool = False
    """Make the run repeatable bit for bit, also across a kill and --resume: a request's tokens depend on nothing but
    its prompt, its seed and the weights, and groups are taken in the order of the data. Costs speed; needs the local
    engine."""
    run_dir: OutputPath = "runs/latest"
    """Directory of the run: config, metrics, report, checkpoints. Must be new or empty without --resume or
    --overwrite."""
    overwrite: bool = False
    """Replace the contents of an earlier run in --run-dir."""
    save: OutputPath | None = None
    """Directory for checkpoints; default: `checkpoints` inside --run-dir."""
    save_interval: _Positive | None = None
    """Save a checkpoint every so many rollouts; the last rollout is always saved."""
    save_hf: OutputPath | None = None
    """Also write the final weights as a Hugging Face directory here."""
    save_total_limit: _Positive | None = None
    """Keep so many of this run's newest checkpoints; default: all."""
    load: UserPath | None = None
    """Folder of checkpoints, or one checkpoint, of another run to continue from."""
    resume: bool = False
    """Continue this run from its newest checkpoint, in its own --run-dir; begin anew where there is none yet: one
    command for the first start and for every other."""
    load_optim: bool = True
    """Continue with the checkpoint's optimizer and schedule; off: fresh ones, on the checkpoint's weights."""
    load_rng: bool = True
    """Continue with the checkpoint's random states; off: fresh ones, from --seed."""
    reset_data_source: bool = False
    """Continue with the prompts from their beginning, whatever the checkpoint says of the data source."""
    eval_interval: _Positive | None = None
    """Evaluate every so many rollouts, and before the first and after the last one."""
    save_debug_rollout_data: OutputPath | None = None
    """Record every rollout in this file, for `miles hooks run` and --load-debug-rollout-data."""
    save_debug_train_data: OutputPath | None = None
    """Record what the first rank of the last pipeline stage trains on in this file, for `miles hooks run`."""
    load_debug_rollout_data: UserPath | None = None
    """Train on the rollouts recorded in this file; no engine starts."""
    debug_rollout_only: bool = False
    """Make rollouts and train nothing; no trainer starts."""
    report_samples: Annotated[int, msgspec.Meta(ge=0)] = 4
    """Groups of each rollout kept for the report's sample browser."""
