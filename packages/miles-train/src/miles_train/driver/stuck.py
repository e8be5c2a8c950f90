"""Where the processes are that did not return, and how others crashed, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.stacks import innermost_frames

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["how_it_crashed", "where_they_are"]

_FRAMES = 6
_PLACES = 4


def where_they_are(stacks: Mapping[str, str], late: Iterable[str], directory: Path) -> str:
    """Say where the late processes hang, the likeliest cause first, and where the stacks of all processes lie.

    `stacks` are what the processes wrote, by NAME-PID; `late` are names as people read them. Of ranks that wait for
    one another most stand in the same place, and the one that keeps them waiting in another.
    """
    places: dict[tuple[str, ...], list[str]] = {}
    for name in late:
        places.setdefault(tuple(_frames_of(name, stacks)), []).append(name)
    lines = []
    order = sorted(places.items(), key=lambda place: (_waits_for_ranks(place[0]), len(place[1])))
    for frames, names in order[:_PLACES]:
        what = "in a collective, which waits for other ranks" if _waits_for_ranks(frames) else "innermost frame first"
        lines += [f"{', '.join(names)}, {what}:", *(f"  {frame}" for frame in frames)]
    lines.append(f"the stacks of {len(stacks)} processes are in {directory}")
    silent = [name for name, text in stacks.items() if not text]
    if silent:
        lines.append(f"no answer from {', '.join(silent)}: stopped, or busy in the kernel")
    return "\n".join(lines)


def how_it_crashed(directory: Path, name: str, pid: str) -> str:
    """Return what a process that has died wrote first, and where the rest is; empty if it wrote nothing."""
    file = directory / f"{name.replace(' ', '-')}-{pid}.txt"
    first = file.read_text(errors="replace").partition("\n")[0] if file.is_file() else ""
    return f"{first}: its stacks are in {file}" if first.startswith("Fatal") else ""


def _waits_for_ranks(frames: tuple[str, ...]) -> bool:
    return bool(frames) and "/torch/distributed/" in frames[0]


def _frames_of(name: str, stacks: Mapping[str, str]) -> list[str]:
    prefix = name.replace(" ", "-")
    texts = [text for key, text in stacks.items() if key.rpartition("-")[0] == prefix]
    return (innermost_frames(texts[0], _FRAMES) if texts else []) or ["(it did not say where)"]
