"""What happens in the process that runs one program on one case: it becomes the program. Standard library alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import traceback
import types
from typing import Any

__all__ = ["RESULT", "become"]

RESULT = 3
"""The descriptor on which calls and assertions report."""


def become(code: str, case: dict[str, Any]) -> int:
    """Run a program and return its exit code.

    A case is `{"kind": "stdin"}`; `{"kind": "call", "name": …, "arguments": […]}`, which reports the returned value as
    JSON; or `{"kind": "assert", "tests": …}`, which reports `ok` when the tests ran to their end.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["solution.py"]
    _open_standard_files()
    exit_code = 1
    try:
        exec(compile(code, "solution.py", "exec"), module.__dict__)
        _report(module, case)
        exit_code = 0
    except SystemExit as stop:
        exit_code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    _finish_threads()
    # What cannot be written, past a limit say, is as good as not printed.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return exit_code & 0xFF


def _open_standard_files() -> None:
    names = {"stdin": io.FileIO(0, "r", closefd=False), "stdout": io.FileIO(1, "w", closefd=False)}
    names["stderr"] = io.FileIO(2, "w", closefd=False)
    for name, raw in names.items():
        buffered = io.BufferedReader(raw) if name == "stdin" else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8", errors="replace"))


def _report(module: types.ModuleType, case: dict[str, Any]) -> None:
    if case["kind"] == "call":
        function = _function(module, case["name"])
        os.write(RESULT, json.dumps(function(*case["arguments"])).encode())
    elif case["kind"] == "assert":
        exec(compile(case["tests"], "tests.py", "exec"), module.__dict__)
        os.write(RESULT, b"ok")


def _function(module: types.ModuleType, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    return getattr(module.__dict__["Solution"](), name)


def _finish_threads() -> None:
    """Wait for threads, as the interpreter does at the end of a program."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
