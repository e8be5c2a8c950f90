"""Tokenizers and processors by model path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

from miles_rollout import tokenizers

__all__ = ["load_processor", "load_tokenizer"]


def load_tokenizer(
    name_or_path: str, chat_template_path: str | None = None, *, trust_remote_code: bool = False, **kwargs: Any
) -> Any:
    """Load a tokenizer; code that comes with the model is never run, whatever `trust_remote_code` says."""
    del trust_remote_code
    if not kwargs and chat_template_path is None:
        return tokenizers.load_tokenizer(name_or_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    if chat_template_path is not None:
        tokenizer.chat_template = Path(chat_template_path).read_text()
    return tokenizer


def load_processor(name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """Load a multimodal processor; None where the model has none. Code that comes with it is never run."""
    del trust_remote_code
    try:
        found = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, ProcessorMixin) else None
