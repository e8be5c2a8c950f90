"""Choose which samples a page carries: evenly over the run, first and last included, within a size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["pick_samples"]

MOST_BYTES = 6_000_000
MOST_ROLLOUTS = 240
MOST_SAMPLES = 256
MOST_CHARACTERS = 6_000
KINDS = ("train", "eval")

_T = TypeVar("_T")

_SAMPLE_FIELDS = ("group_index", "index", "response", "reward", "status", "response_length", "dataset")
_PROMPT_FIELDS = ("prompt", "label")
_OWN = ("turn", "turns", "tool_calls", "malformed_tool_calls", "tool_timeouts", "turn_timeouts", "observation_tokens")
"""Metadata that tells of one sample's conversation, also where all samples of its group have the same."""


class _Head(msgspec.Struct):
    kind: str
    rollout_id: int = 0


class _Place(msgspec.Struct):
    offset: int
    size: int
    rollout_id: int


def pick_samples(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return `train` and `eval`: each a list of `{rollout_id, groups, left_out}` and how many there were in all.

    The file may be far larger than memory: one pass finds where its lines begin, a second reads the chosen ones.
    """
    found = _places(path)
    picked: dict[str, Any] = {kind: {"rollouts": [], "of": len(found[kind])} for kind in KINDS}
    if path.is_file():
        with path.open("rb") as file:
            for kind in KINDS:
                for place in _spread(found[kind], most_bytes // len(KINDS)):
                    file.seek(place.offset)
                    line = _decoded(file.read(place.size), dict)
                    if line is not None:
                        picked[kind]["rollouts"].append(_entry(place.rollout_id, line))
    return picked


def _decoded(line: bytes, kind: type[_T]) -> _T | None:
    """Return a line's content, or None for what a run that died left half written."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _places(path: Path) -> dict[str, list[_Place]]:
    found: dict[str, dict[int, _Place]] = {kind: {} for kind in KINDS}
    if path.is_file():
        offset = 0
        with path.open("rb") as lines:
            for line in lines:
                head = _decoded(line, _Head)
                if head is not None and head.kind in found:
                    found[head.kind][head.rollout_id] = _Place(offset, len(line), head.rollout_id)
                offset += len(line)
    return {kind: [places[key] for key in sorted(places)] for kind, places in found.items()}


def _spread(places: list[_Place], most_bytes: int) -> list[_Place]:
    if not places:
        return []
    mean = sum(place.size for place in places) / len(places)
    count = max(1, min(len(places), MOST_ROLLOUTS, math.floor(most_bytes / mean)))
    if count == 1:
        return places[-1:]
    step = (len(places) - 1) / (count - 1)
    return [places[round(place * step)] for place in range(count)]


def _entry(rollout_id: int, line: dict[str, Any]) -> dict[str, Any]:
    """Group a rollout's samples; what a group has in common stands in it once."""
    samples = [sample for sample in line.get("samples") or [] if isinstance(sample, dict)]
    groups: dict[Any, dict[str, Any]] = {}
    metadata: dict[Any, list[dict[str, Any]]] = {}
    for place, sample in enumerate(samples[:MOST_SAMPLES]):
        index = sample.get("group_index")
        key = (index if isinstance(index, int) else f"sample {place}", msgspec.json.encode(sample.get("prompt")))
        if key not in groups:
            shared = {name: _clip(sample.get(name)) for name in _PROMPT_FIELDS}
            groups[key] = {"index": index, **shared, "samples": []}
        groups[key]["samples"].append({name: _clip(sample[name]) for name in _SAMPLE_FIELDS if name in sample})
        said = sample.get("metadata")
        metadata.setdefault(key, []).append(_clip(said) if isinstance(said, dict) else {})
    for key, found in metadata.items():
        _share(groups[key], found)
    return {"rollout_id": rollout_id, "groups": list(groups.values()), "left_out": max(0, len(samples) - MOST_SAMPLES)}


def _share(group: dict[str, Any], metadata: list[dict[str, Any]]) -> None:
    """Put metadata that all samples of a group have, a prompt's usually, in the group and the rest in each sample."""
    first, *others = metadata
    shared = {
        name: value
        for name, value in first.items()
        if name not in _OWN and all(name in other and other[name] == value for other in others)
    }
    group["metadata"] = shared
    for sample, own in zip(group["samples"], metadata, strict=True):
        sample["metadata"] = {name: value for name, value in own.items() if name not in shared}


def _clip(value: Any) -> Any:
    """Shorten a long text in its middle: a response's answer stands at its end."""
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        return f"{value[:half]}\n[… {len(value) - 2 * half:,} characters left out …]\n{value[-half:]}"
    if isinstance(value, dict):
        return {key: _clip(item) for key, item in value.items()}
    return [_clip(item) for item in value] if isinstance(value, list) else value
