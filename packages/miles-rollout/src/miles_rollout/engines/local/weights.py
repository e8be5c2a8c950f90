"""Model directories: what they must hold, and safetensors read by name with shapes checked first."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from miles_rollout.engines.local.errors import CheckpointError

__all__ = ["Checkpoint", "check_model_dir", "check_weights_dir", "checksum", "read_json"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


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


def checksum(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return a short hash per tensor name, of its float32 bytes."""
    return {
        name: blake2b(tensor.detach().float().contiguous().numpy().data, digest_size=8).hexdigest()
        for name, tensor in sorted(tensors.items())
    }
