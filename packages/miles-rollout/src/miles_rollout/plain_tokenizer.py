"""A tokenizer from its files alone, where these say all that transformers would make of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from miles_api.errors import DataError
from miles_rollout.tokenizer_files import ChatTemplate, read_object

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import AddedToken

__all__ = ["PlainTokenizer", "plain_backend"]

_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
"""Classes that add nothing to what `tokenizer.json` says."""
_CHANGING = ("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "split_special_tokens", "auto_map")
"""Settings with which transformers does more than its backend."""
_MORE_FILES = ("special_tokens_map.json", "added_tokens.json")
"""Written by older versions of transformers, and still read."""
_CORRECTED_FAMILIES = {
    *("hyperclovax_vision_v2", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"),
}
"""Model types for which transformers takes a class of its own, whatever the files say."""
_OF_A_TOKEN = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
_PATCHED_ABOVE = 100_000
"""Vocabularies from here on may be of a family whose files transformers corrects."""
_NOT_FOR_TEMPLATES = {
    *("continue_final_message", "documents", "max_length", "padding", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "tokenizer_kwargs", "truncation"),
}
"""Arguments of transformers' `apply_chat_template` that are more than variables of the template."""


def plain_backend(folder: Path) -> Tokenizer | None:
    """Return the backend where `tokenizer.json` alone decides; None where transformers has a say.

    Raises `DataError` for a tokenizer.json that cannot be read.
    """
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        return None
    config = read_object(folder / "tokenizer_config.json")
    # Without a class the model's family decides.
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or any(config.get(key) for key in _CHANGING):
        return None
    if read_object(folder / "config.json").get("model_type") in _CORRECTED_FAMILIES:
        return None
    if any((folder / name).is_file() for name in _MORE_FILES):
        return None
    try:
        backend = Tokenizer.from_file(str(whole))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise DataError(f"{whole} cannot be read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend if _holds_all(backend, config) else None


def _holds_all(backend: Tokenizer, config: dict[str, Any]) -> bool:
    """Whether every token that the config names is in the backend as the config has it: transformers would add it."""
    if backend.get_vocab_size() > _PATCHED_ABOVE:
        return False
    added = backend.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder", {})
    if any(int(i) not in added or not _same(added[int(i)], token) for i, token in listed.items()):
        return False
    special = {token.content for token in added.values() if token.special}
    named = [config.get(f"{kind}_token") for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    named += config.get("additional_special_tokens") or []
    named += config.get("extra_special_tokens") or []
    return all(_text(token) in special for token in named if token)


class PlainTokenizer:
    """What prompts need of a tokenizer, with transformers' names and results, without its seconds of import."""

    def __init__(self, path: str, backend: Tokenizer, whole: Callable[[], Any]) -> None:
        """`backend` comes from `plain_backend`; `whole()` loads the same tokenizer with transformers."""
        self._backend, self._load_whole = backend, whole
        self._template = ChatTemplate(path)
        eos = _text(read_object(Path(path, "tokenizer_config.json")).get("eos_token"))
        self.eos_token_id: int | None = backend.token_to_id(eos) if eos else None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(self, messages: Any, **keywords: Any) -> Any:
        """Render messages as transformers does; what more it can do with them than that, it does itself."""
        if keywords.keys() & _NOT_FOR_TEMPLATES:
            return self._load_whole().apply_chat_template(messages, **keywords)
        return self._template.apply_chat_template(messages, **keywords)


def _same(held: AddedToken, told: dict[str, Any]) -> bool:
    return all(getattr(held, name) == told.get(name) for name in _OF_A_TOKEN)


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
