"""`miles hooks run REF --as NAME --samples DUMP`: what would change if this hook had been in the recorded run?"""

from __future__ import annotations

import argparse
import contextlib
import sys
from time import monotonic
from typing import Any

import msgspec

from miles_api.cli.hooks.words import find_spec
from miles_api.parsing.given import locate
from miles_api.replay import Replay, Request, replay
from miles_api.replay.options import settings

__all__ = ["HELP", "NAME", "configure", "run"]

NAME = "run"
HELP = "call a hook on what a run recorded, and say what changes"
_OK, _FAILED = 0, 1
_BETWEEN = 0.2
"""Seconds between two states of the progress line."""
_EPILOG = """\
DUMP is what --save-debug-rollout-data recorded, for train-side hooks --save-debug-train-data, or a sample that a hook
failed on (failed/*.mdump in a run directory). The hook gets the recorded run's options as args.

A `def` hook runs in threads, an async one on one event loop; --workers gives it processes, which can be ended where a
call hangs.

exit codes:
  0  every call gave a result, changed or not
  1  a call raised or gave what it may not; with --fail-on-change also if a result differs
  2  refused before any call

--json prints one object: {"hook", "reference", "recorded_reference", "dump", "unit", "how", "calls", "seconds",
"calls_per_second", "failed", "changed", "failures": [{"what", "kind", "message", "frames"}], "slowest", "skipped",
"damage", "facts": {…}}"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("reference", metavar="REF", nargs="?", help="path/file.py:fn, pkg.mod:fn or a short name; default: the "
        "recorded run's own")  # fmt: skip
    add("--as", dest="hook", metavar="NAME", required=True, help="the hook that it is meant to be")
    add("--samples", metavar="DUMP", required=True, help="what a run recorded")
    add("--limit", type=_count, metavar="N", help="make at most so many calls")
    add("--workers", type=_count, default=0, metavar="N", help="call it in so many processes")
    add("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="what one call may take (default: 60)")
    add("--threshold", type=float, default=0.5, metavar="X", help="rewards above it are good ones (default: 0.5)")
    add("--show", type=int, default=5, metavar="N", help="list so many changes (default: 5)")
    add("--set", action="append", default=[], metavar="OPTION=VALUE", dest="settings",
        help="an option that is other than in the recorded run: JSON or text (repeat the flag for each)")  # fmt: skip
    add("--fail-on-change", action="store_true", help="exit with 1 if a result differs from the recorded one")
    add("--json", action="store_true", help="print one object")


def run(options: argparse.Namespace) -> int:
    """Replay, and say what was found."""
    request = Request(
        hook=find_spec(options.hook).name, dump=options.samples, reference=options.reference, limit=options.limit,
        workers=options.workers, timeout=options.timeout, threshold=options.threshold, shown=options.show,
        settings=settings(options.settings),
    )  # fmt: skip
    line = _ProgressLine() if sys.stderr.isatty() and not options.json else None
    # What the hook prints would end up in the middle of the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = replay(request, line or _silent)
    if line:
        line.clear()
    if options.json:
        print(msgspec.json.encode(_object(result)).decode())
    else:
        print("\n".join(_lines(result)))
        for text in _failures(result):
            print(text, file=sys.stderr)
    if result.damage and not options.json:
        print(f"warning: {result.damage}", file=sys.stderr)
    return _FAILED if result.failed or (options.fail_on_change and result.changed) else _OK


class _ProgressLine:
    """One line on stderr that is written over."""

    def __init__(self) -> None:
        self._next = 0.0
        self._started = monotonic()

    def __call__(self, done: int, bad: int) -> None:
        now = monotonic()
        if now < self._next:
            return
        self._next = now + _BETWEEN
        rate = done / max(now - self._started, 1e-9)
        print(f"\r{done} calls, {rate:.0f}/s, {bad} changed or failed\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Wipe the line."""
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _silent(_done: int, _bad: int) -> None:
    """Show nothing."""


def _object(result: Replay) -> dict[str, Any]:
    found = {name: value for name, value in msgspec.structs.asdict(result).items() if name != "lines"}
    return {**found, "calls_per_second": _rate(result)}


def _rate(result: Replay) -> float:
    return result.calls / result.seconds if result.seconds else 0.0


def _lines(result: Replay) -> list[str]:
    recorded = result.recorded_reference
    said = (
        "the same reference"
        if recorded == locate(result.reference, None)
        else recorded or f"no {result.hook} hook of its own"
    )
    lines = [
        f"{result.hook} hook {result.reference} on {result.dump}, recorded with {said}",
        *("  " + line for line in result.lines),
        f"{_counted(result.calls, result.unit)} in {result.seconds:.2f} s {result.how}, {_rate(result):.0f}/s"
        + (f", {result.failed} failed" if result.failed else ""),
    ]
    if result.calls > 1:
        slowest = ", ".join(f"{one['what']} {one['seconds'] * 1000:.1f} ms" for one in result.slowest)
        lines.append(f"slowest: {slowest}")
    lines += [f"left out: {count} {what}" for what, count in result.skipped.items()]
    return lines


def _counted(count: int, unit: str) -> str:
    plural = "batches" if unit == "batch" else unit + "s"
    return f"{count} {unit if count == 1 else plural}"


def _failures(result: Replay) -> list[str]:
    lines = []
    for failure in result.failures:
        lines.append(f"{failure['what']}: {failure['kind']}: {failure['message']}")
        lines += [f"    {frame}" for frame in failure["frames"]]
    more = result.failed - len(result.failures)
    return lines + ([f"… and {more} more"] if more else [])


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return seconds
