"""The report's table of hooks: which ran, from where, and how they fared, added up over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import counted
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import HookStats
from miles_train.view.words import duration, number

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HookTotals", "hook_attention", "hook_rows"]

MOST_PROCESSES = 3
MOST_REASONS = 4
DEFAULT = "default"
"""The reference of a hook that nobody set: that it was not needed is no news."""
DRIVER = "driver"
"""The process that checks hooks and calls none."""


class HookTotals(HookStats, kw_only=True):
    """One hook as every process that loaded the same file of it ran it."""

    hook: str
    reference: str
    distribution: str
    file: str
    sha256: str
    processes: list[str] = []
    checkable: bool = True
    idle: str = ""
    """Why this run does not call it; empty for those it calls."""

    def add(self, report: dict[str, Any]) -> None:
        """Add what one process says."""
        process = str(report.get("process") or "")
        if process == DRIVER:
            self.idle = "" if report.get("called", True) else str(report.get("note") or "not by this run")
        else:
            self.processes.append(process)
        self.checkable = self.checkable and report.get("checkable") is not False
        self.calls += _count(report.get("calls"))
        self.seconds += _amount(report.get("seconds"))
        self.errors += _count(report.get("errors"))
        self.timeouts += _count(report.get("timeouts"))
        self.retries += _count(report.get("retries"))
        self.skipped += _count(report.get("skipped"))
        drops = report.get("drops")
        for reason, count in drops.items() if isinstance(drops, dict) else ():
            self.drops[str(reason)] = self.drops.get(str(reason), 0) + _count(count)

    @property
    def is_counted(self) -> bool:
        """Say whether no calls means that nobody called it; of a class only what it is asked for later is counted."""
        return bool(self.calls) or self.hook not in REGISTRY or REGISTRY[self.hook].kind == "function"

    @property
    def where(self) -> str:
        """The first few processes."""
        names = list(dict.fromkeys(self.processes))
        more = f" and {len(names) - MOST_PROCESSES} more" if len(names) > MOST_PROCESSES else ""
        return ", ".join(names[:MOST_PROCESSES]) + more

    @property
    def microseconds(self) -> str:
        """Mean time of a call."""
        return number(1e6 * self.seconds / self.calls) if self.calls else "—"

    @property
    def seconds_text(self) -> str:
        """Total time."""
        return duration(self.seconds) if self.calls else "—"

    @property
    def dropped(self) -> int:
        """How much it dropped, over all reasons."""
        return sum(self.drops.values())

    @property
    def reasons(self) -> str:
        """The most frequent reasons for which it dropped."""
        most = sorted(self.drops.items(), key=lambda item: -item[1])
        more = f" and {len(most) - MOST_REASONS} more" if len(most) > MOST_REASONS else ""
        return ", ".join(f"{reason} {count:,}" for reason, count in most[:MOST_REASONS]) + more

    @property
    def trouble(self) -> str:
        """Time-outs and retries, in words."""
        parts = [(self.timeouts, "timed out"), (self.retries, "retried")]
        return ", ".join(f"{count:,} {what}" for count, what in parts if count)


def hook_rows(hooks: Sequence[dict[str, Any]]) -> list[HookTotals]:
    """Return one row for each hook, reference and file, added up over processes."""
    rows: dict[tuple[str, ...], HookTotals] = {}
    for hook in hooks:
        name, reference, file, sha256, distribution, version = (
            str(hook.get(key) or "") for key in ("hook", "reference", "file", "sha256", "distribution", "version")
        )
        origin = f"{distribution} {version}".strip()
        row = rows.setdefault(
            (name, reference, sha256, origin),
            HookTotals(hook=name, reference=reference, distribution=origin, file=file, sha256=sha256),
        )
        row.add(hook)
    return list(rows.values())


def hook_attention(rows: Sequence[HookTotals], *, has_rollouts: bool) -> list[str]:
    """Return what a reader should not overlook about the hooks of a run."""
    found = []
    for row in rows:
        parts = [
            (row.errors, f"raised {counted(row.errors, 'error')}"),
            (row.timeouts, f"timed out {counted(row.timeouts, 'time')}"),
        ]
        if any(count for count, _ in parts):
            found.append(f"hook {row.hook} ({row.reference}) " + " and ".join(text for count, text in parts if count))
    found += [
        f"hook {row.hook} ({row.reference}) was loaded and never called"
        for row in rows
        # Counts are written after each rollout: before the first one is done they say nothing.
        if has_rollouts and not (row.calls or row.skipped or row.idle) and row.reference != DEFAULT and row.is_counted
    ]
    references = {(row.hook, row.reference) for row in rows}
    if len(references) < len(rows):
        found.append("processes ran different files or versions of the same hook")
    return found


def _amount(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _count(value: object) -> int:
    return len(value) if isinstance(value, list) else int(_amount(value))
