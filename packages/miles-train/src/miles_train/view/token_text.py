"""The text of a few tokens, by the tokenizer of the run's model; their ids where that is not at hand."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TokenText"]

_SIGNS = str.maketrans({" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"})


class TokenText:
    """Decodes tokens; the tokenizer is read when the first one is asked for."""

    def __init__(self, config: str, run_dir: Path) -> None:
        """`config` is the text of the run's `config.toml`; a relative path in it is of the file, or of its start."""
        self._config, self._run_dir = config, run_dir
        self._tokenizer: Any = None
        self._looked = False

    def around(self, tokens: Sequence[int], at: int) -> tuple[str, str, str]:
        """Return the text before the token at `at`, its own and what follows.

        A decoder may leave out the space that a text begins with, so each part is what it adds to those before it. A
        token of white space, or without any text, is shown by signs or by its id.
        """
        before, upto, whole = (self._text(tokens[:end]) for end in (at, at + 1, len(tokens)))
        own = upto[len(before) :] if upto.startswith(before) else self._text(tokens[at : at + 1])
        after = whole[len(upto) :] if whole.startswith(upto) else self._text(tokens[at + 1 :])
        if not own.strip():
            own = own.translate(_SIGNS) or f"[{tokens[at]}]" if at < len(tokens) else ""
        return before, own, after

    def _text(self, tokens: Sequence[int]) -> str:
        if not self._looked:
            self._looked = True
            self._tokenizer = self._find()
        if self._tokenizer is None:
            return " ".join(map(str, tokens))
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _find(self) -> Any:
        """Return the tokenizer of --hf-checkpoint; None where it is not here, or cannot be read."""
        try:
            model = tomllib.loads(self._config)["run"]["hf_checkpoint"]
        except (tomllib.TOMLDecodeError, KeyError, TypeError):
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
        try:
            return library.Tokenizer.from_file(str(path))
        except Exception:  # of a file that it cannot read it raises nothing more particular
            return None
