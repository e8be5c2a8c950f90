"""Load the tokenizer of a model directory once in a process, and encode repeated prompts once."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from miles_api.errors import DataError
from miles_rollout.plain_tokenizer import PlainTokenizer, plain_backend
from miles_rollout.tokenizer_files import require_tokenizer

__all__ = ["encode", "load_prompt_tokenizer", "load_tokenizer"]


@functools.cache
def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of `--hf-checkpoint`; `DataError` if the directory holds none. Runs no code from it."""
    require_tokenizer(path)
    # transformers takes seconds to import, and checks and replayed rollouts need no tokenizer.
    transformers = importlib.import_module("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"--hf-checkpoint {path}: the tokenizer does not load: {error}") from error


@functools.cache
def load_prompt_tokenizer(path: str) -> Any:
    """Load what turns prompts into ids, with transformers only where the tokenizer's files do not say all.

    It has `encode`, `apply_chat_template` and `eos_token_id`, with the results of `load_tokenizer`'s. Raises
    `DataError`.
    """
    require_tokenizer(path)
    backend = plain_backend(Path(path))
    if backend is None:
        return load_tokenizer(path)
    return PlainTokenizer(path, backend, functools.partial(load_tokenizer, path))


@functools.lru_cache(maxsize=4096)
def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of `text`, no special tokens added; a group's samples share one encoding."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))
