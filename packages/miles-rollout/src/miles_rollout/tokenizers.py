"""Load the tokenizer of a model directory once in a process, and encode repeated prompts once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from miles_api.errors import DataError

__all__ = ["encode", "load_tokenizer"]


@functools.cache
def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of `--hf-checkpoint`; `DataError` if the directory holds none. Runs no code from it."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"--hf-checkpoint {path} holds no tokenizer (tokenizer.json or tokenizer_config.json)")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"--hf-checkpoint {path}: the tokenizer does not load: {error}") from error


@functools.lru_cache(maxsize=4096)
def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of `text`, no special tokens added; a group's samples share one encoding."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))
