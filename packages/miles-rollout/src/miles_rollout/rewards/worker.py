"""The grading process: `python -m miles_rollout.rewards.worker PARENT`, one question and one answer a line."""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

_MEMORY = 2 << 30
"""Bytes of address space for the answers, beside what the graders themselves take; one that wants more gets no
verdict."""
_LOOK = 0.5
"""Seconds between two looks at whether the parent still lives."""
_GRACE = 2.0
"""Seconds after the deadline, which the parent keeps, at which the kernel ends a process that nobody ended."""


def main() -> None:
    """Answer questions until the parent closes the pipe or is gone."""
    parent = int(sys.argv[1])
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    # Answers go out where stdout was; what a grader prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    known: dict[str, Callable[..., Any]] = {}
    for line in sys.stdin:
        seconds, _, question = line.partition(" ")
        # With its default action: it ends the process even inside one long operation, where no handler would run.
        signal.setitimer(signal.ITIMER_REAL, float(seconds) + _GRACE)
        answer = _answered(known, json.loads(question))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answered(known: dict[str, Callable[..., Any]], question: list[Any]) -> dict[str, Any]:
    reference, *given = question
    try:
        if not given:
            module, _, name = reference.partition(":")
            known[reference] = getattr(importlib.import_module(module), name)
            _limit_memory()
            return {"score": 0.0}
        return {"score": float(known[reference](*given))}
    except DataError as error:
        return {"count": "data", "error": str(error)}
    except ImportError as error:
        return {"count": "import", "error": str(error)}
    except MemoryError as error:
        return {"count": "memory", "error": str(error) or "MemoryError"}
    except Exception as error:
        return {"count": "error", "error": f"{type(error).__name__}: {error}"[:500]}


def _limit_memory() -> None:
    # Not before the import: numpy alone maps gigabytes on a machine of many cores. Of no use where the hard limit is
    # lower already, and elsewhere than on Linux the limit is not kept.
    if sys.platform == "linux":
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _leave_with(parent: int) -> None:
    """End this process when it has lost its parent: one that is busy does not see the pipe close."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


if __name__ == "__main__":
    main()
