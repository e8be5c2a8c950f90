"""One request inside the engine, from its arrival to its last token."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from miles_rollout.engines.protocol import VersionSpan

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_rollout.engines.protocol import FinishReason

__all__ = ["Job", "News"]


@dataclass(eq=False, slots=True)
class Job:
    """One prompt and one sample of it. The model thread writes it; others read it once it is in `News.finished`.

    A streaming job is also read while it runs: `output_ids` and `logprobs` only ever grow.
    """

    rid: str
    ids: list[int]
    """The prompt."""
    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int = 0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the request, end of sequence included."""
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    return_logprob: bool = False
    prompt_logprob_start: int = -1
    """Position from which the prompt's log-probs are wanted, or -1."""
    stream: bool = False
    listener: Callable[[Job], None] | None = None
    """Called on the event loop after each step that gave a streaming job tokens, and once at the end."""

    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    cached_tokens: int = 0
    versions: list[tuple[int, str]] = field(default_factory=list)
    """(first output token, weight version), in order."""
    finish: FinishReason | None = None
    error: BaseException | None = None
    """Why no reply can be given: the engine died, or the weights are broken."""
    started: float = field(default_factory=time.perf_counter)
    finished: float = 0.0
    text: str = ""
    """The decoded output, once delivered."""
    delivered: bool = False
    """Set on the event loop when it hears of the end; `finish` may be set a moment earlier, by the model thread."""

    @property
    def watched(self) -> bool:
        """Whether each token is looked at as it comes."""
        return self.stream or bool(self.stop_strings)

    @property
    def all_ids(self) -> list[int]:
        """The prompt and what was drawn so far: what has to be prefilled."""
        return self.ids + self.output_ids if self.output_ids else self.ids

    def key(self) -> bytes:
        """Return a hashable form of `all_ids`."""
        return array("i", self.all_ids).tobytes()

    def end(self, reason: FinishReason) -> None:
        """Mark the job finished."""
        self.finish = reason
        self.finished = time.perf_counter()

    def note_version(self, first: int, version: str) -> None:
        """Note that output tokens from `first` on are drawn with the weights named `version`."""
        if self.versions and self.versions[-1][0] == first:
            self.versions.pop()
        if not self.versions or self.versions[-1][1] != version:
            self.versions.append((first, version))

    def version_spans(self, count: int) -> list[VersionSpan]:
        """Return one span for each run of the first `count` output tokens drawn with the same
        weights."""
        versions = self.versions
        ends = [*(min(start, count) for start, _ in versions[1:]), count][: len(versions)]
        return [
            VersionSpan(version=version, start=start, end=end)
            for (start, version), end in zip(versions, ends, strict=True)
            if end > start
        ]


@dataclass(slots=True)
class News:
    """What one step changed, for those who listen."""

    finished: list[Job] = field(default_factory=list)
    progressed: dict[Job, None] = field(default_factory=dict)
    """Streaming jobs with new tokens, each once."""

    def __bool__(self) -> bool:
        return bool(self.finished or self.progressed)
