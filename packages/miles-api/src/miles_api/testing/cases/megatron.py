"""Do the hooks of a trainer rank run at their moments? Model and optimizer are small stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from miles_api.testing.case import case
from miles_api.testing.tensors import the_torch

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_STAND_INS = "Megatron itself: model and optimizer are small stand-ins of torch's, and there are no process groups"


@case("megatron_init", acts=True, left_out="Megatron itself: there are no process groups")
def _megatron_init(trial: Trial) -> None:
    with trial.check("runs once on a rank"):
        trial.call(trial.args)


@case("before_log_prob", acts=True, left_out=_STAND_INS)
def _before_log_prob(trial: Trial) -> None:
    model = _model(the_torch(trial))
    for prefix, of in (("", "actor"), ("ref_", "reference"), ("teacher_", "teacher")):
        with trial.check(f"prepares the pass of the {of}"):
            trial.call(trial.args, model, prefix)
            _require_finite(trial, model)


@case("before_train_step", acts=True, left_out=_STAND_INS)
def _before_train_step(trial: Trial) -> None:
    model = _model(the_torch(trial))
    rate = trial.args.lr if "lr" in trial.args else 1e-6
    # Not one of torch's: the first of those imports its compiler, which takes seconds.
    groups = [{"params": list(model[0].parameters()), "lr": rate, "weight_decay": 0.0}]
    optimizer = SimpleNamespace(param_groups=groups, state={}, step=_nothing, zero_grad=_nothing)
    scheduler = SimpleNamespace(max_lr=rate, min_lr=0.0, num_steps=0, step=_nothing)
    for rollout_id, step_id in ((0, 0), (0, 1), (1, 0)):
        with trial.check(f"runs before step {step_id} of rollout {rollout_id}"):
            trial.call(trial.args, rollout_id, step_id, model, optimizer, scheduler)
            _require_finite(trial, model)
            for group in optimizer.param_groups:
                trial.number(group["lr"], "learning rate")


@case("post_save", acts=True, left_out="where it sends the checkpoint")
def _post_save(trial: Trial) -> None:
    checkpoint, hf = trial.directory / "rollout-0", trial.directory / "rollout-0" / "hf"
    hf.mkdir(parents=True)
    files = {checkpoint / "weights.bin": b"weights", hf / "config.json": b"{}"}
    for file, content in files.items():
        file.write_bytes(content)
    for hf_dir, of in ((str(hf), "with"), (None, "without")):
        with trial.check(f"takes a checkpoint {of} a Hugging Face directory"):
            trial.call(trial.args, 0, str(checkpoint), hf_dir)
            for file, content in files.items():
                same = file.is_file() and file.read_bytes() == content
                trial.require(same, f"changed or removed {file.name} of the checkpoint, from which a run continues")


def _nothing(*_arguments: Any) -> None: ...


def _model(torch: Any) -> list[Any]:
    """Return what stands for a rank's model: a list of one module a pipeline chunk."""
    return [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))]


def _require_finite(trial: Trial, model: list[Any]) -> None:
    for name, weight in model[0].named_parameters():
        trial.require(bool(weight.isfinite().all()), "has NaN or infinity", field=name)
