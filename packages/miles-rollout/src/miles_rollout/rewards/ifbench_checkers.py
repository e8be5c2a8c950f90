"""Instruction following, verified by program: IFEval (arXiv 2311.07911) and IFBench (arXiv 2507.02833).

The checkers are those of the package `if-verifiable`, asked as the benchmarks' own strict evaluation asks them.
It comes with `miles-rollout[rewards]`; importing this module needs it and takes a second.
"""

from __future__ import annotations

import importlib
import random
import re
from typing import Any

import langdetect
import nltk

from miles_api.errors import DataError, did_you_mean
from miles_rollout.rewards.ifbench import instructions
from miles_rollout.rewards.thinking import after_thinking
from miles_rollout.rewards.wording import shown

__all__ = ["ifbench_check", "ifbench_score"]

_PROBE = "Here is one plain sentence. Here is another one, with a number: 12."
_MISSING = re.compile(r"Resource (?:'|\x1b\[\d+m)?([\w.]+)")


def ifbench_score(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if a response follows every instruction of its prompt, strictly, else 0.0; `label` is not read.

    `metadata` holds `instruction_id_list` and `kwargs`, as both benchmarks publish them. What stands before `</think>`
    is not read, and an empty answer follows nothing. An answer that a checker cannot digest does not follow it. Raises
    `DataError` for an unknown instruction, for arguments that it does not take or lacks, and for NLTK data that is not
    on this machine: nothing is downloaded.
    """
    answer = after_thinking(response)
    checkers = [_built(*stated) for stated in instructions(metadata)]
    return float(bool(answer.strip()) and all(_followed(checker, answer) for checker in checkers))


def ifbench_check(label: Any, metadata: dict[str, Any]) -> None:
    """Raise `DataError` unless the instructions of a prompt can be verified on this machine."""
    for stated in instructions(metadata):
        _rehearse(_built(*stated))


def _loaded() -> dict[str, Any]:
    # The package downloads what NLTK lacks when it is imported.
    download, nltk.download = nltk.download, lambda *_, **__: False
    try:
        parts = [
            importlib.import_module(f"if_verifiable.{name}.instructions_registry") for name in ("ifeval", "ifbench")
        ]
    finally:
        nltk.download = download
    # Without a seed, the language of a short text differs from call to call.
    langdetect.DetectorFactory.seed = 0
    return {name: checker for part in parts for name, checker in part.INSTRUCTION_DICT.items()}


# Here and not at the first answer: a grader's deadline begins when its module is imported.
_REGISTRY = _loaded()


def _built(name: str, given: dict[str, Any]) -> Any:
    """Return the checker of one instruction."""
    if name not in _REGISTRY:
        raise DataError(
            f"metadata instruction_id_list names {name!r}, which no checker knows{did_you_mean(name, _REGISTRY)}"
        )
    checker = _REGISTRY[name](name)
    takes = set(checker.get_instruction_args_keys())
    if takes != set(given):
        absent, extra = ", ".join(sorted(takes - set(given))), ", ".join(sorted(set(given) - takes))
        wrong = " and ".join([f"lack {absent}"] * bool(absent) + [f"hold {extra}"] * bool(extra))
        raise DataError(f"metadata kwargs of {name!r} {wrong}: expected {', '.join(sorted(takes)) or 'none'}")
    before = random.getstate()
    try:
        checker.build_description(**given)
        if random.getstate() != before:
            _undo_draws(checker, given)
    except Exception as error:
        raise DataError(f"metadata kwargs of {name!r} are {shown(given)}: {error}") from error
    finally:
        random.setstate(before)
    return checker


def _undo_draws(checker: Any, given: dict[str, Any]) -> None:
    """Put back what a checker replaced by chance: a letter that is none ("#"), an index that is 0.

    The benchmarks' own data has both, and their verdict on such a prompt differs from run to run.
    """
    kept = checker.get_instruction_args()
    for key, value in given.items():
        if kept[key] != value:
            if f"_{key}" not in vars(checker):
                raise ValueError(f"{key} is out of range")
            setattr(checker, f"_{key}", value)


def _followed(checker: Any, answer: str) -> bool:
    try:
        return bool(checker.check_following(answer))
    except MemoryError:
        raise
    except Exception:
        # Either the data is wrong, and then no text can be checked, or this answer is one that the checker trips over.
        _rehearse(checker)
        return False


def _rehearse(checker: Any) -> None:
    try:
        checker.check_following(_PROBE)
    except Exception as error:
        missing = _MISSING.search(str(error)) if type(error) is LookupError else None
        if missing is None:
            raise DataError(f"metadata kwargs of {checker.id!r} cannot be checked: {error!r}") from error
        raise DataError(
            f"{checker.id!r} needs NLTK's {missing[1]}, which is not on this machine: "
            f"python -m nltk.downloader {missing[1]}, or name the directory that has it in NLTK_DATA"
        ) from None
