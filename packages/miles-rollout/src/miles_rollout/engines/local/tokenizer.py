"""Text in and out: the `tokenizers` backend used directly where that is the same as transformers, else through it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from miles_api.errors import DataError
from miles_rollout.engines.local.errors import CheckpointError
from miles_rollout.engines.local.json_file import read_json
from miles_rollout.plain_tokenizer import plain_backend

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["TextCodec", "TextStream"]

# The engine has one thread to give; rayon's pool would fight with it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TextCodec:
    """Encodes prompts, decodes outputs, and knows which tokens end a text."""

    def __init__(self, directory: Path) -> None:
        backend, slow = _plain_backend(directory), None
        if backend is None:
            backend, slow = _through_transformers(directory)
        self._backend = backend
        self._slow: Any = slow
        """The tokenizer of transformers; there exactly when `_backend` is not."""
        self.eos_ids = _eos_ids(directory, self)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return token ids; with `special`, those too that the tokenizer adds on its own."""
        if self._backend is None:
            return self._slow.encode(text, add_special_tokens=special)
        return self._backend.encode(text, add_special_tokens=special).ids

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its text."""
        if self._backend is None:
            return self._slow.convert_tokens_to_ids(token)
        return self._backend.token_to_id(token)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of some token ids."""
        return self.decode_many([ids], skip_special_tokens)[0]

    def decode_many(self, many: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """Return the texts of several sequences, in one call of the backend."""
        if self._backend is None:
            return [self._slow.decode(ids, skip_special_tokens=skip_special_tokens) for ids in many]
        return self._backend.decode_batch(many, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool) -> TextStream:
        """Return an incremental decoder."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Decodes one sequence as it grows, holding back half characters and what may begin a stop string."""

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._codec, self._skip = codec, skip_special_tokens
        self._backend, self._steps = codec._backend, DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._text = ""

    def push(self, ids: list[int], stop_strings: tuple[str, ...]) -> str:
        """Add tokens; return the whole text so far that no later token can take back."""
        if self._backend is None:
            self._ids += ids
            self._text = self._codec.decode(self._ids, self._skip).rstrip("\ufffd")
        else:
            for token in ids:
                self._text += self._steps.step(self._backend, token) or ""
        return self._text[: len(self._text) - _held_back(self._text, stop_strings)]


def _held_back(text: str, stop_strings: Iterable[str]) -> int:
    """Return how many trailing characters are a beginning of a stop string."""
    longest = 0
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def _plain_backend(directory: Path) -> Tokenizer | None:
    try:
        return plain_backend(directory)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _through_transformers(directory: Path) -> tuple[Tokenizer | None, Any]:
    # transformers takes seconds to import, and most tokenizers never need it here.
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        slow: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    backend = getattr(slow, "backend_tokenizer", None)
    # After construction the backend is what transformers decodes with, unless it cleans up spaces afterwards.
    if isinstance(backend, Tokenizer) and not slow.clean_up_tokenization_spaces:
        backend.no_padding()
        backend.no_truncation()
        return backend, None
    return None, slow


def _eos_ids(directory: Path, codec: TextCodec) -> tuple[int, ...]:
    """Return every token that ends a text: of the config, the generation config and the tokenizer, as SGLang does."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        found.update([ids] if isinstance(ids, int) else ids or [])
    path = directory / "tokenizer_config.json"
    token = read_json(path).get("eos_token") if path.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token and (token_id := codec.token_id(token)) is not None:
        found.add(token_id)
    return tuple(sorted(found))
