"""Show how a run goes while it goes: a few live lines on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from miles_train.view.metric_words import unsaid
from miles_train.view.series import EVAL_NAME
from miles_train.view.words import clock, number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

__all__ = ["Progress", "sparkline"]

TREND = 24
ACTIVITY_WIDTH = 18
REFRESHES_A_SECOND = 4
RECENT = 20

_BARS = "▁▂▃▄▅▆▇█"
_SLOWEST_LINES = 60.0
_LINES_A_RUN = 20
_OTHER = ("convert", "weight_sync", "eval", "other")


class Progress:
    """The progress of one run, as a context manager around its driver.

    On a terminal a live display is refreshed at most four times a second by a thread of its own. Elsewhere a line is
    written for the first rollout, the last one, and between them at most every `plain_seconds`; runs that last get
    fewer lines, down to one a minute. Calls cost microseconds in both.
    """

    def __init__(
        self,
        total_rollouts: int,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        plain_seconds: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`live` overrides what the stream says about being a terminal; `stream` is stderr by default."""
        self._total = total_rollouts
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream, force_terminal=live, highlight=False)
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._state = _State(total_rollouts, now)
        self._lock = threading.Lock()
        self._live: Live | None = None
        if terminal if live is None else live:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES_A_SECOND,
                redirect_stdout=self._stream in (sys.stdout, sys.stderr),
                redirect_stderr=self._stream in (sys.stdout, sys.stderr),
            )
        self._now = now
        self._plain_seconds = plain_seconds
        self._last_line: float | None = None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            text = self._state.ending(error)
            self._state.phase = None
        if self._live is not None:
            self._live.stop()
        self._line(text)

    def phase(self, name: str, rollout_id: int | None = None) -> None:
        """Say what the run does now; `rollout_id` is None before the first rollout and after the last."""
        with self._lock:
            self._state.enter(name, rollout_id)
        if self._live is None and rollout_id is None:
            self._line(f"[{clock(self._state.elapsed)}] {name}")

    def rollout(self, rollout_id: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Take the numbers of a rollout that is done: metrics and seconds as in `metrics.jsonl`.

        The first time that optimizer steps change nothing, a line that stays says why; once for each cause.
        """
        with self._lock:
            self._state.finish(rollout_id, metrics, seconds)
            news = unsaid(metrics, self._state.told)
        for text in news:
            self.note(f"rollout {rollout_id + 1}: {text}")
        if self._live is None and self._due(rollout_id):
            self._last_line = self._now()
            self._line(self._state.line())

    def eval(self, metrics: Mapping[str, float]) -> None:
        """Take the numbers of an evaluation, shown from now on."""
        with self._lock:
            self._state.evaluate(metrics)

    def note(self, text: str) -> None:
        """Write a line that stays."""
        if self._live is None:
            self._line(text)
        else:
            self._console.print(Text(text))

    def _due(self, rollout_id: int) -> bool:
        if self._last_line is None or rollout_id + 1 >= self._total:
            return True
        between = min(_SLOWEST_LINES, max(self._plain_seconds, self._state.elapsed / _LINES_A_RUN))
        return self._now() - self._last_line >= between

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _render(self) -> Group:
        with self._lock:
            return self._state.render()


class _State:
    """What is known of the run, and how it reads."""

    def __init__(self, total: int, now: Callable[[], float]) -> None:
        self.total = total
        self.now = now
        self.started = now()
        self.done = 0
        self.phase: str | None = "starting"
        self.phase_since = self.started
        self.phase_rollout: int | None = None
        self.metrics: Mapping[str, float] = {}
        self.seconds: Mapping[str, float] = {}
        self.rewards: deque[float] = deque(maxlen=TREND)
        self.ends: deque[float] = deque(maxlen=RECENT)
        self.held_out: dict[str, tuple[float, float]] = {}
        self.told: set[str] = set()
        """The causes of steps that changed nothing that were said."""

    @property
    def elapsed(self) -> float:
        return self.now() - self.started

    @property
    def rollout_seconds(self) -> float | None:
        """Wall-clock seconds a rollout took lately, evaluations and saving included."""
        if len(self.ends) > 1:
            return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return _total(self.seconds)

    @property
    def eta(self) -> str:
        each = self.rollout_seconds
        return clock(each * max(0, self.total - self.done)) if each is not None and self.done else "—"

    def enter(self, name: str, rollout_id: int | None) -> None:
        self.phase, self.phase_rollout, self.phase_since = name, rollout_id, self.now()

    def finish(self, rollout_id: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        self.done = rollout_id + 1
        self.metrics, self.seconds = metrics, seconds
        self.ends.append(self.now())
        if "rollout/reward" in metrics:
            self.rewards.append(metrics["rollout/reward"])

    def evaluate(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            match = EVAL_NAME.fullmatch(name)
            if match and match["metric"] == "reward":
                first, _ = self.held_out.get(match["dataset"], (value, value))
                self.held_out[match["dataset"]] = (first, value)

    def line(self) -> str:
        """Return the state as one plain line."""
        parts = [
            f"rollout {self.done}/{self.total}",
            *self._measured(),
            self._held_out(first=False),
            self._length(),
            self._speed(),
            *self._split(),
            self._gap(),
            f"eta {self.eta}",
        ]
        return "  ".join(part for part in parts if part)

    def ending(self, error: BaseException | None) -> str:
        """Return the last line of a run."""
        if error is not None:
            where = f"rollout {self.done}/{self.total}" + (f" in {self.phase}" if self.phase else "")
            return f"stopped at {where} after {clock(self.elapsed)}: {type(error).__name__}"
        parts = [
            f"finished {self.done}/{self.total} rollouts in {clock(self.elapsed)}",
            *self._measured(),
            self._held_out(first=True),
        ]
        return "  ".join(part for part in parts if part)

    def render(self) -> Group:
        """Return the state as the live display."""
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        where = Text.assemble("rollout ", (f"{self.done}/{self.total}", "bold"), "  ", (self._activity(), "cyan"))
        bar = ProgressBar(total=max(1, self.total), completed=self.done, complete_style="cyan", finished_style="green")
        head.add_row(where, bar, Text(f"{clock(self.elapsed)}, eta {self.eta}", style="dim"))
        trend = (
            Text.assemble("reward ", (number(self.rewards[-1]), "bold green"), " ", (sparkline(self.rewards), "green"))
            if self.rewards
            else Text("  ".join(self._measured()))
        )
        learned = [trend, Text(self._held_out(first=True)), Text(self._length()), Text(self._gap())]
        spent = [self._speed(), self._each(), *self._split(), *self._rest()]
        rows = [
            Text("  ").join(part for part in learned if part),
            Text("  ".join(part for part in spent if part), style="dim"),
        ]
        for row in rows:
            row.no_wrap, row.overflow = True, "ellipsis"
        return Group(head, *(row for row in rows if row))

    def _activity(self) -> str:
        # Padded, so that the bar beside it keeps its place from one phase to the next.
        since = f"{self.phase} {number(round(self.now() - self.phase_since, 1))} s" if self.phase else "done"
        return since.ljust(ACTIVITY_WIDTH)

    def _measured(self) -> list[str]:
        if self.rewards:
            return [f"reward {self.rewards[-1]:.2f}"]
        loss = self.metrics.get("train/loss")
        return [] if loss is None else [f"loss {number(loss)}"]

    def _held_out(self, *, first: bool) -> str:
        shown = []
        for dataset, (before, last) in self.held_out.items():
            value = f"{before:.2f} → {last:.2f}" if first and before != last else f"{last:.2f}"
            shown.append(f"{dataset} {value}" if len(self.held_out) > 1 else value)
        return f"held-out {', '.join(shown)}" if shown else ""

    def _length(self) -> str:
        length = self.metrics.get("rollout/response_length")
        return "" if length is None else f"len {length:,.1f}"

    def _speed(self) -> str:
        tokens, total = self.metrics.get("rollout/tokens"), _total(self.seconds)
        return f"{number(tokens / total)} tok/s" if tokens is not None and total else ""

    def _each(self) -> str:
        each = self.rollout_seconds
        return "" if each is None else f"{_seconds(each)} s a rollout"

    def _split(self) -> list[str]:
        names = (("gen", "generate"), ("train", "train"))
        return [f"{short} {_seconds(self.seconds[name])} s" for short, name in names if name in self.seconds]

    def _rest(self) -> list[str]:
        rest = sum(self.seconds.get(name, 0.0) for name in _OTHER)
        return [f"rest {_seconds(rest)} s"] if self.seconds else []

    def _gap(self) -> str:
        gap = self.metrics.get("train/logprob_gap_max")
        return "" if gap is None else f"gap {gap:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 1 else number(seconds)


def _total(seconds: Mapping[str, float]) -> float | None:
    return seconds.get("total") or sum(seconds.values()) or None


def sparkline(values: deque[float] | list[float]) -> str:
    """Return values as block characters between their smallest and largest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / span * top) if span else 0] for value in finite)
