"""Do conversions give whole columns of plain values?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from miles_api.batch import check_columns
from miles_api.rollout_types import flatten
from miles_api.testing.case import case
from miles_api.testing.tensors import clone, rollout_data, the_torch
from miles_api.testing.untouched import IDENTITY, Untouched

if TYPE_CHECKING:
    from miles_api.sample import Sample
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_MASKS = ("loss_masks",)
_NUMBERS = ("rewards", "raw_reward")
_PLAIN_LISTS = ("tokens", "loss_masks", "rollout_log_probs", "teacher_log_probs")


@case("convert_samples")
def _convert_samples(trial: Trial) -> None:
    def convert(samples: list[Sample]) -> dict[str, Any]:
        samples = sorted(samples, key=lambda sample: (sample.group_index or 0, sample.index or 0))
        before = Untouched(samples, IDENTITY)
        raw = [sample.get_reward_value(trial.args) for sample in samples]
        batch = trial.call(trial.args, samples, raw_rewards=raw, rewards=[value - 0.5 for value in raw])
        trial.require(isinstance(batch, dict), f"returned a {type(batch).__name__}, not a dict of columns")
        check_columns(batch)
        _require_plain(trial, batch)
        before.require(trial)
        return batch

    with trial.check("returns whole columns of plain lists"):
        convert(trial.maker.scored(1.0, 0.0, 1.0))
    with trial.check("takes groups of different sizes, groups of one, fan-outs, removed and empty samples"):
        samples = flatten(trial.maker.rollout())
        batch = convert(samples)
    with trial.check("keeps removed samples out of the loss"):
        removed = {sample.index for sample in samples if sample.remove_sample}
        for index, mask in zip(batch["sample_indices"], batch["loss_masks"], strict=True):
            if index in removed:
                trial.require(
                    not any(mask), f"sample {index} is removed, and its loss mask is not all 0", field="loss_masks"
                )


def _require_plain(trial: Trial, batch: dict[str, Any]) -> None:
    """Fail unless columns hold Python lists and numbers: they travel to the trainer, and no torch is needed here."""
    for name in [name for name in _PLAIN_LISTS if name in batch]:
        for index, entry in zip(batch["sample_indices"], batch[name], strict=True):
            plain = isinstance(entry, list) and all(type(value) in (int, float, bool) for value in entry)
            trial.require(
                plain, f"sample {index} has a {type(entry).__name__} that is no list of plain numbers", field=name
            )
            trial.require(all(map(math.isfinite, entry)), f"sample {index} has NaN or infinity", field=name)
    for index, mask in zip(batch["sample_indices"], batch["loss_masks"], strict=True):
        trial.require(set(mask) <= {0, 1}, f"sample {index} has values other than 0 and 1", field="loss_masks")
    for name in _NUMBERS:
        for value in batch[name]:
            trial.number(value, name)


@case("rollout_data_postprocess", left_out="several ranks, pipeline and context parallelism")
def _rollout_data_postprocess(trial: Trial) -> None:
    torch = the_torch(trial)
    for title, keep in (("changes columns in place and keeps them whole", None), ("takes a single sample", [0])):
        with trial.check(title):
            data = rollout_data(torch, keep)
            before = clone(torch, data)
            result = trial.call(trial.args, 0, data)
            trial.require(
                result is None, f"returned a {type(result).__name__}; what it returns is not used: change in place"
            )
            _require_same_samples(trial, torch, before, data)


def _require_same_samples(trial: Trial, torch: Any, before: dict[str, Any], data: dict[str, Any]) -> None:
    size = len(before["sample_indices"])
    for name in ("response_lengths", "total_lengths", "sample_indices"):
        trial.require(
            data.get(name) == before[name], "may not change here: change samples before conversion", field=name
        )
    for name, column in data.items():
        trial.require(
            hasattr(column, "__len__") and len(column) == size, f"has no entry for each of {size} samples", field=name
        )
    for name in before:
        trial.require(name in data, "is gone", field=name)
    trial.require(
        all(torch.equal(a, b) for a, b in zip(before["tokens"], data["tokens"], strict=True)),
        "may not change here: change samples before conversion",
        field="tokens",
    )
    for name in ("loss_masks", "rollout_log_probs", "log_probs", "advantages", "returns"):
        for index, values, length in zip(data["sample_indices"], data[name], data["response_lengths"], strict=True):
            fits = isinstance(values, torch.Tensor) and tuple(values.shape) == (length,)
            trial.require(fits, f"sample {index} no longer has a 1-D tensor of {length} response tokens", field=name)
            trial.require(bool(values.isfinite().all()), f"sample {index} has NaN or infinity", field=name)
