"""Where weights come from: model directories, and tensors that were sent; read by name, with shapes checked first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from miles_api.checksum import checksums
from miles_rollout.engines.local.errors import CheckpointError
from miles_rollout.engines.local.json_file import read_json

if TYPE_CHECKING:
    from miles_rollout.engines.local.model import SlotModel

__all__ = [
    "Checkpoint",
    "Weights",
    "check_model_dir",
    "check_weights_dir",
    "completed",
    "live_checksum",
]

Weights = Path | Mapping[str, torch.Tensor]
"""A directory, or tensors that were sent, by their Hugging Face names."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_model_dir(model_path: str) -> Path:
    """Return the directory after checking that config, tokenizer and weights are there.

    Raises:
        CheckpointError: the first file that is missing, by name.
    """
    directory = Path(model_path)
    if not directory.is_dir():
        raise CheckpointError(f"model path {model_path} is not a directory")
    for names, what in (
        (("config.json",), "the model configuration"),
        (("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"), "the tokenizer"),
        ((_SINGLE, _INDEX), "the weights"),
    ):
        if not any((directory / name).is_file() for name in names):
            raise CheckpointError(f"{directory / names[0]} is missing ({what})")
    return directory


def check_weights_dir(directory: Path) -> Path:
    """Return the directory of a weight update after checking that it holds safetensors; a config is not needed.

    Raises:
        CheckpointError: it is no directory or has no weights.
    """
    if not directory.is_dir():
        raise CheckpointError(f"model path {directory} is not a directory")
    if not any((directory / name).is_file() for name in (_SINGLE, _INDEX)):
        raise CheckpointError(f"{directory / _SINGLE} is missing (the weights)")
    return directory


class Checkpoint:
    """The tensors of one directory, opened once, or those that were sent; nothing is read before `get`.

    Use as a context manager. Raises `CheckpointError` when a file is missing or damaged.
    """

    def __init__(self, weights: Weights) -> None:
        self._files = []
        self._where: dict[str, Any] = {}
        self._sent: Mapping[str, torch.Tensor] = {}
        if isinstance(weights, Mapping):
            self.origin, self._sent = "the weights that were sent", weights
            return
        self.origin = str(weights)
        for name in _file_names(weights):
            self._open(weights / name)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return [*self._where, *self._sent]

    def _open(self, path: Path) -> None:
        try:
            handle = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._files.append(handle)
        self._where.update(dict.fromkeys(handle.keys(), handle))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.clear()
        self._where.clear()
        self._sent = {}

    def check(self, expected: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Compare names and shapes with `expected`; names in `ignored` may be there or not.

        Raises:
            CheckpointError: what is missing, unexpected or of another shape (up to five of each).
        """
        have = set(self.names) - ignored
        missing, extra = sorted(set(expected) - have), sorted(have - set(expected))
        if missing:
            raise CheckpointError(f"{self.origin}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
        if extra:
            raise CheckpointError(f"{self.origin}: {len(extra)} unexpected tensors: {', '.join(extra[:5])}")
        for name, want in expected.items():
            got = self._shape(name)
            if got != want:
                raise CheckpointError(f"{self.origin}: {name} has shape {list(got)}, the model needs {list(want)}")

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor as float32."""
        if name in self._sent:
            return self._sent[name].to(torch.float32)
        try:
            return self._where[name].get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.origin}: tensor {name} cannot be read: {error}") from error

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._sent[name].shape if name in self._sent else self._where[name].get_slice(name).get_shape())


def completed(sent: dict[str, torch.Tensor], current: Weights) -> dict[str, torch.Tensor]:
    """Return all weights after an update of some: those that were sent, and the others as they are now.

    Raises:
        CheckpointError: the current weights cannot be read.
    """
    with Checkpoint(current) as checkpoint:
        # A clone: the file behind a memory-mapped tensor may be gone soon.
        return {name: sent[name] if name in sent else checkpoint.get(name).clone() for name in checkpoint.names} | sent


def live_checksum(model: SlotModel, weights: Weights) -> tuple[dict[str, str], list[str]]:
    """Return the hashes of the tensors in `weights`, and which of the model's own tensors did not come from them.

    The model holds tensors that are computed from a checkpoint's, so these are computed once more and compared.

    Raises:
        CheckpointError: the directory cannot be read any more.
    """
    fresh = model.computed(weights)
    stale = [name for name, tensor in model.tensors().items() if not torch.equal(tensor, fresh[name])]
    with Checkpoint(weights) as checkpoint:
        return checksums({name: checkpoint.get(name) for name in checkpoint.names}), stale


def _file_names(directory: Path) -> list[str]:
    if (directory / _INDEX).is_file():
        return sorted(set(read_json(directory / _INDEX).get("weight_map", {}).values()))
    if not (directory / _SINGLE).is_file():
        raise CheckpointError(f"{directory / _SINGLE} is missing (the weights)")
    return [_SINGLE]
