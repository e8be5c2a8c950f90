"""That the configured hooks are the ones that run: the same code in every process, and called when they should be."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.config import DERIVED
from miles_api.errors import DataError, HookError
from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import differs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from miles_api.checks.check import CheckReport
    from miles_api.checks.hook_rows import HookRow
    from miles_api.spec import Moment
    from miles_train.driver.run_dir import RunDir
    from miles_train.driver.services import Services

__all__ = ["HookWatch", "code_differences", "not_fired"]

Reports = dict[str, list[dict[str, Any]]]
"""What each process says of its hooks, by its name: `driver`, `rollout`, `trainer 0`, `router`."""


def code_differences(reports: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[str]:
    """Compare what the processes loaded under the same hook and reference; return each difference in words.

    The first process that names a hook is what the others are compared with: the driver, for what it could read.
    """
    first: dict[tuple[str, str], dict[str, Any]] = {}
    found = []
    for process, hooks in reports.items():
        for hook in ({"process": process, **hook} for hook in hooks):
            difference = differs(first.setdefault((hook["hook"], hook["reference"]), hook), hook)
            found += [difference] if difference else []
    return found


def not_fired(
    hooks: Iterable[HookRow], reports: Mapping[str, Iterable[Mapping[str, Any]]], moment: Moment
) -> list[str]:
    """Return in words the hooks that this run calls at `moment` and that no process has called or skipped."""
    counts: dict[tuple[str, str], int] = {}
    for hook in (hook for rows in reports.values() for hook in rows if "calls" in hook):
        name = (hook["hook"], hook["reference"])
        # A class or a value is used as soon as it is loaded: what it is asked for later is not the run's business.
        used = hook["calls"] + hook["skipped"] if REGISTRY[hook["hook"]].kind == "function" else 1
        counts[name] = counts.get(name, 0) + used
    return [
        f"{row.hook} hook {row.reference} ({row.flag or 'found beside another'}): "
        + ("was loaded and not called" if (row.hook, row.reference) in counts else "no process loaded it")
        for row in _due(hooks, moment)
        if not counts.get((row.hook, row.reference))
    ]


def _due(hooks: Iterable[HookRow], moment: Moment) -> list[HookRow]:
    return [row for row in hooks if row.called and not row.part_of and REGISTRY[row.hook].moment == moment]


class HookWatch:
    """Asks every process for its hooks, writes `hooks.json`, and stops a run whose hooks are not what was asked for."""

    def __init__(
        self, report: CheckReport, services: Services, run_dir: RunDir, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """`say` gets the one line that tells that every hook was called."""
        self._hooks = report.hooks
        sources = report.config.sources if report.config else {}
        self._derived = {name for name, spec in REGISTRY.items() if spec.field and sources.get(spec.field) == DERIVED}
        self._services = services
        self._run_dir = run_dir
        self._say = say
        self._seen: set[Moment] = set()
        self._reports: Reports = {
            # Of what cannot be imported here there is nothing to compare with.
            "driver": [msgspec.to_builtins(row) for row in report.hooks if row.abi]
        }

    def started(self) -> None:
        """Compare the code that all processes loaded, before the first rollout; raises `HookError`."""
        self.collect()
        differences = code_differences(self._reports)
        if differences:
            raise HookError("the processes of this run loaded different code:\n  " + "\n  ".join(differences))
        self._require("start")

    def after(self, moment: Moment) -> None:
        """Require at the first `moment` that each hook which it calls was called; raises `HookError`."""
        first = moment not in self._seen
        # Checkpoints are rare enough to look at the trainers' hooks each time.
        if first or moment == "save":
            self.collect()
        if first:
            self._require(moment)

    def collect(self, patience: float | None = None) -> None:
        """Ask every process for its hooks and how they fared, and write it to `hooks.json`.

        `patience` is for a run that fails: seconds to wait for each, and who does not answer keeps what it said last.
        """
        self._reports |= self._services.hook_reports(patience)
        # On a full disk what made the run fail is the error.
        with suppress(*((DataError,) if patience else ())):
            self._run_dir.hooks(self._reports)

    def rollout(self, hooks: list[dict[str, Any]]) -> None:
        """Take what the rollout process said along with its result."""
        self._reports["rollout"] = hooks
        self._run_dir.hooks(self._reports)

    def _require(self, moment: Moment) -> None:
        self._seen.add(moment)
        silent = not_fired(self._hooks, self._reports, moment)
        if silent:
            raise HookError(
                f"configured hooks that {_DEADLINES[moment]} should have been called were not; the run stops, since "
                "it is not the one that was asked for:\n  " + "\n  ".join(silent)
            )
        fired = dict.fromkeys(row.hook for row in _due(self._hooks, moment) if row.hook not in self._derived)
        if moment == "rollout" and fired:
            self._say(f"every configured hook was called: {', '.join(fired)}")


_DEADLINES: dict[Moment, str] = {
    "start": "by the start of the first rollout",
    "rollout": "in the first rollout",
    "eval": "by the first evaluation",
    "save": "with the first checkpoint",
}
