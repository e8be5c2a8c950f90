"""A tokenizer that needs no file: one token a byte, with the few methods of Hugging Face's that hooks call."""

from __future__ import annotations

from typing import Any

__all__ = ["ByteTokenizer"]

_FIRST_BYTE = 2
_BYTES = 256


class ByteTokenizer:
    """Ids 0 and 1 are padding and end of text; byte b is b + 2."""

    pad_token, pad_token_id = "<pad>", 0
    eos_token, eos_token_id = "<eos>", 1
    bos_token, bos_token_id = None, None
    vocab_size = _BYTES + _FIRST_BYTE
    all_special_ids = (0, 1)
    chat_template = "role: content"

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str | list[str], **_options: Any) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` of one text or several."""
        each = [self.encode(one) for one in (text if isinstance(text, list) else [text])]
        masks = [[1] * len(ids) for ids in each]
        if isinstance(text, list):
            return {"input_ids": each, "attention_mask": masks}
        return {"input_ids": each[0], "attention_mask": masks[0]}

    def encode(self, text: str, **_options: Any) -> list[int]:
        """Return one id a byte of UTF-8; special tokens are never added."""
        return [byte + _FIRST_BYTE for byte in text.encode()]

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_options: Any) -> str:
        """Return the text of ids; ids beyond the bytes wrap around, so that those of other tokenizers can be shown."""
        parts: list[bytes] = []
        for token in [ids] if isinstance(ids, int) else ids:
            if token >= _FIRST_BYTE:
                parts.append(bytes([(int(token) - _FIRST_BYTE) % _BYTES]))
            elif not skip_special_tokens:
                parts.append((self.pad_token, self.eos_token)[int(token)].encode())
        return b"".join(parts).decode(errors="replace")

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Decode each sequence."""
        return [self.decode(ids, **options) for ids in sequences]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the text of each id."""
        return self.decode([ids]) if isinstance(ids, int) else [self.decode([one]) for one in ids]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **_options: Any,
    ) -> Any:
        """Return `role: content` lines, as ids or as text; tools stand in front by name."""
        lines = [f"tools: {', '.join(tool['function']['name'] for tool in tools)}"] if tools else []
        lines += [f"{message.get('role')}: {message.get('content')}" for message in conversation]
        text = "\n".join([*lines, *(["assistant: "] if add_generation_prompt else [])])
        return self.encode(text) if tokenize else text
