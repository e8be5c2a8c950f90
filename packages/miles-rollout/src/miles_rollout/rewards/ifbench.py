"""Instruction following: what a prompt's metadata asks for. `ifbench_checkers` verifies it.

IFEval (arXiv 2311.07911) and IFBench (arXiv 2507.02833) publish their prompts in one form.
"""

from __future__ import annotations

from typing import Any

from miles_api.errors import DataError
from miles_rollout.rewards.thinking import after_thinking
from miles_rollout.rewards.wording import shown

__all__ = ["instructions", "quick_ifbench"]


def quick_ifbench(response: str, label: Any, metadata: dict[str, Any]) -> float | None:
    """Return 0.0 for an empty answer, None for others. Raises `DataError` for metadata of a wrong form."""
    instructions(metadata)
    return None if after_thinking(response).strip() else 0.0


def instructions(metadata: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the instructions of a prompt, each with its arguments; null arguments are left out.

    Raises `DataError` for metadata of a wrong form.
    """
    names, given = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"metadata instruction_id_list is {shown(names)}: expected a list of instructions, such as "
            '["punctuation:no_comma"]'
        )
    given = [given] * len(names) if given is None or isinstance(given, dict) else given
    if not isinstance(given, list) or not all(item is None or isinstance(item, dict) for item in given):
        raise DataError(f"metadata kwargs is {shown(given)}: expected a list of objects, one for each instruction")
    if len(given) != len(names):
        raise DataError(f"metadata has {len(given)} kwargs for {len(names)} instructions: expected one for each")
    return [
        (name, {key: value for key, value in (item or {}).items() if value is not None})
        for name, item in zip(names, given, strict=True)
    ]
