"""Model directories: what they must hold, and safetensors read by name with shapes checked first."""

from __future__ import annotations

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
    "check_model_dir",
    "check_weights_dir",
    "live_checksum",
]

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
    """The tensors of one directory, opened once; nothing is read before `get`.

    Use as a context manager. Raises `CheckpointError` when a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = []
        self._where: dict[str, Any] = {}
        for name in self._file_names():
            self._open(directory / name)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._where)

    def _file_names(self) -> list[str]:
        if (self.directory / _INDEX).is_file():
            return sorted(set(read_json(self.directory / _INDEX).get("weight_map", {}).values()))
        if not (self.directory / _SINGLE).is_file():
            raise CheckpointError(f"{self.directory / _SINGLE} is missing (the weights)")
        return [_SINGLE]

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

    def check(self, expected: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Compare names and shapes with `expected`; names in `ignored` may be there or not.

        Raises:
            CheckpointError: what is missing, unexpected or of another shape (up to five of each).
        """
        have = set(self._where) - ignored
        missing, extra = sorted(set(expected) - have), sorted(have - set(expected))
        if missing:
            raise CheckpointError(f"{self.directory}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
        if extra:
            raise CheckpointError(f"{self.directory}: {len(extra)} unexpected tensors: {', '.join(extra[:5])}")
        for name, want in expected.items():
            got = tuple(self._where[name].get_slice(name).get_shape())
            if got != want:
                raise CheckpointError(f"{self.directory}: {name} has shape {list(got)}, the model needs {list(want)}")

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor as float32."""
        try:
            return self._where[name].get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.directory}: tensor {name} cannot be read: {error}") from error


def live_checksum(model: SlotModel, directory: Path) -> tuple[dict[str, str], list[str]]:
    """Return the hashes of the tensors in `directory`, and which of the model's own tensors did not come from them.

    The model holds tensors that are computed from a checkpoint's, so these are computed once more and compared.

    Raises:
        CheckpointError: the directory cannot be read any more.
    """
    # pyrefly: ignore[bad-argument-count]  every model is made from these two
    fresh = type(model)(directory, model.max_positions).tensors()
    stale = [name for name, tensor in model.tensors().items() if not torch.equal(tensor, fresh[name])]
    with Checkpoint(directory) as checkpoint:
        return checksums({name: checkpoint.get(name) for name in checkpoint.names}), stale
