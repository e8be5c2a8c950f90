"""The text of a few tokens, by the tokenizer of the run's model; their ids where that is not at hand."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TokenText"]


class TokenText:
    """Decodes tokens; the tokenizer is read when the first one is asked for."""

    def __init__(self, config: str, run_dir: Path) -> None:
        """`config` is the text of the run's `config.toml`; a relative path in it is of the file, or of its start."""
        self._config, self._run_dir = config, run_dir
        self._tokenizer: Any = None
        self._looked = False

    def around(self, tokens: Sequence[int], at: int) -> tuple[str, str, str]:
        """Return the text before the token at `at`, its own and what follows."""
        return self._text(tokens[:at]), self._text(tokens[at : at + 1]), self._text(tokens[at + 1 :])

    def _text(self, tokens: Sequence[int]) -> str:
        if not self._looked:
            self._looked = True
            self._tokenizer = self._find()
        if self._tokenizer is None:
            return " ".join(map(str, tokens))
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _find(self) -> Any:
        """Return the tokenizer of --hf-checkpoint; None where it, or what reads it, is not on this machine."""
        try:
            model = tomllib.loads(self._config).get("run", {}).get("hf_checkpoint")
        except tomllib.TOMLDecodeError:
            return None
        files = [base / str(model) / "tokenizer.json" for base in (self._run_dir, Path())]
        path = next((file for file in files if model and file.is_file()), None)
        if path is None:
            return None
        try:
            # It comes with the trainer; a report may be written where no trainer is.
            library = importlib.import_module("tokenizers")
        except ModuleNotFoundError:
            return None
        return library.Tokenizer.from_file(str(path))
