"""Megatron hooks: moments in the life of a trainer rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args


@hook(flag="--custom-megatron-init-path", since=(1, 0), side="train", moment="start", default="does nothing")
def megatron_init(args: Args, /) -> None:
    """Run your own set-up on a trainer rank.

    Called once on every rank, after Megatron initialised its process groups and before the model is built.
    """
    raise NotImplementedError


@hook(
    flag="--custom-megatron-before-log-prob-hook-path",
    since=(1, 0),
    side="train",
    moment="rollout",
    default="does nothing",
)
def before_log_prob(args: Args, model: Any, store_prefix: str, /) -> None:
    """Prepare the model for a pass that only computes log-probs.

    Called on every rank before each such pass; `store_prefix` is `""` (actor), `"ref_"` or `"teacher_"`. `model` is
    Megatron's list of chunks, each wrapped for data parallelism.
    """
    raise NotImplementedError


@hook(
    flag="--custom-megatron-before-train-step-hook-path",
    since=(1, 0),
    side="train",
    moment="rollout",
    many=True,
    default="does nothing",
)
def before_train_step(
    args: Args, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any, /
) -> None:
    """Look at or change model, optimizer and schedule before an optimizer step.

    Called on every rank, before the forward pass of each step that trains anything; `step_id` counts from 0 in each
    rollout. `optimizer` and `opt_param_scheduler` are Megatron's own: a learning rate set in `optimizer.param_groups`
    is that of this step, and the schedule sets the next one.
    """
    raise NotImplementedError


@hook(flag="--custom-megatron-post-save-hook-path", since=(1, 0), side="train", moment="save", default="does nothing")
def post_save(args: Args, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None, /) -> None:
    """Do something with a finished checkpoint: upload it, register it.

    Called on rank 0 after the checkpoint directory was renamed into place.
    """
    raise NotImplementedError
