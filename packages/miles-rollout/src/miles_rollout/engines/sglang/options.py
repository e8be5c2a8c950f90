"""The options of SGLang engines."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from miles_api.options import ForeignOptions, Options

__all__ = ["SGLangOptions", "interpreter"]


class SGLangOptions(Options, frozen=True, kw_only=True):
    """How SGLang engines are started."""

    sglang_python: str | None = None
    """Python interpreter that has SGLang; default: the one that runs Miles. SGLang pins torch, transformers and CUDA
    libraries exactly, and seldom as the trainer does: in an environment of its own it needs none of ours."""
    sglang_args: ForeignOptions = {}
    """Any argument of SGLang's own server, also as a key of the table [sglang]; the installed SGLang checks it before
    anything starts. Not those that other options set, such as its model path, address or parallel size."""


def interpreter(options: SGLangOptions) -> str:
    """Return the path of the Python that runs SGLang; a link stays one, it may stand for a virtual environment."""
    if options.sglang_python is None:
        return sys.executable
    given = str(Path(options.sglang_python).expanduser())
    return os.path.abspath(given) if os.sep in given else shutil.which(given) or given  # noqa: PTH100  not resolved
