"""Everything that can be known to be wrong before a run starts, in one report: `miles check`, and how `train` begins.

An installed package takes part with a module under the entry-point group `miles.checks`, named after the side it runs:
`HOOKS`, the hooks it can call; `idle(config)`, those of them that this run does not call, with the reason;
`check(config)`, which yields problems. If it likes it also has `derived(config)`, options that follow from others, by
name, `notes(config)`, lines for the plan, and `parts(config)`, hooks that a hook of its own calls. Checks import
neither torch nor Ray, and start nothing.
"""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.checks.derive import derive_batch, derive_rollout
from miles_api.checks.hook_rows import HookRow, part_rows, rows_of
from miles_api.checks.run_checks import check_run_options, idle_by_run_options
from miles_api.config import DERIVED, RunConfig
from miles_api.errors import ConfigError, MilesDeprecationWarning, MilesError
from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import configured_hooks
from miles_api.loading.load import entry_points, provider
from miles_api.options import flag_of
from miles_api.parsing.parse import parse_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["CheckReport", "Problem", "check_all", "check_run", "check_words", "derive", "idle_hooks"]

_API = "miles-api"
_SIDES = {
    "rollout": ("miles-rollout", "prompts, tokenizer, rewards, engines"),
    "train": ("miles-train", "model sizes, parallelism, objective, directories"),
    "router": ("miles-router", "address and port"),
}
"""Who implements each side, and what of a run only that package can check."""
TABLES = {
    "train": ("parallel", "optimizer", "objective", "models", "batching", "weight_sync", "cluster", "logging"),
    "rollout": ("rollout", "data", "reward", "engines", "local_engine", "sglang", "eval", "failures", "generate"),
    "router": ("router",),
}
"""The TOML tables of each side: without its package they are left unread, not unknown."""

_FLAG = re.compile(r"--[a-z0-9][a-z0-9-]*")
_TOML_VALUE = re.compile(r"[^:\n]+: (\w+) = ")
_TABLE = re.compile(r"[^:\n]+: unknown table \[(\w+)\]")
_UNREADABLE = re.compile(r"there is no run file |.* is not TOML: ")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that cannot work."""

    message: str
    """Flag or key, value, what was expected and the nearest choice, in words."""
    package: str
    """The distribution whose check found it."""
    flag: str | None = None
    """The flag it is about, where there is one."""


class CheckReport(msgspec.Struct):
    """What the checks of all installed packages say of a run."""

    config: RunConfig | None
    """The run with everything derived; None where the words could not be read at all."""
    problems: list[Problem]
    hooks: list[HookRow]
    """Every configured hook, whether this run will call it or not."""
    notes: list[str] = []
    """What changes the result of the run and not only its speed."""
    not_checked: list[str] = []
    """What no installed package could check."""

    def require(self) -> None:
        """Raise `ConfigError` with all problems if there are any."""
        if self.problems:
            raise ConfigError("\n".join(problem.message for problem in self.problems))


def check_words(argv: Sequence[str], *, prog: str) -> CheckReport:
    """Read `[RUN.toml] [--flag value …]` and check the run that it describes.

    Values that cannot be read are problems and take their defaults, so that the rest is checked too; what follows only
    from such a default is not reported.
    """
    texts: list[str] = []
    try:
        config = parse_run(argv, prog=prog, problems=texts)
    except ConfigError as error:
        return CheckReport(None, list(_problems([str(error)], _API)), [])
    unreadable = [text for text in texts if _UNREADABLE.match(text)]
    if unreadable:
        # Without the file most of what follows would be about what it sets.
        return CheckReport(None, list(_problems(unreadable[:1], _API)), [])
    absent = {table for side in set(_SIDES) - set(entry_points("miles.checks")) for table in TABLES[side]}
    unread = [match[0] for text in texts if (match := _TABLE.match(text)) and match[1] in absent]
    misread = list(_problems([text for text in texts if not text.startswith(tuple(unread) or ("\0",))], _API))
    report = check_run(config)
    broken = {problem.flag for problem in misread}
    report.problems = misread + [p for p in report.problems if not broken.intersection(_FLAG.findall(p.message))]
    report.not_checked += [f"{text}, of a package that is not installed" for text in unread]
    return report


def check_all(config: RunConfig) -> CheckReport:
    """Run the checks of every installed package; `ConfigError` lists all problems."""
    report = check_run(config)
    report.require()
    return report


def check_run(config: RunConfig) -> CheckReport:
    """Derive what follows from the options, resolve every configured hook and run all checks; nothing is raised."""
    problems: list[Problem] = []
    notes: list[str] = []
    try:
        config = derive_batch(config)
    except ConfigError as error:
        problems += _problems([str(error)], _API)
    checkers = _checkers(problems)
    config = _derive_others(config, checkers)
    with _deprecations(notes):
        rows, texts = rows_of(config, _idle(config, checkers))
        texts += _uncalled(config, checkers, rows)
        problems += _problems([*texts, *check_run_options(config)], _API)
        for owner, module in checkers.values():
            problems += _problems(_found_by(module, config), owner)
            notes += module.notes(config) if hasattr(module, "notes") else []
            rows += part_rows(module.parts(config)) if hasattr(module, "parts") else []
    missing = [f"{what}: {owner} is not installed" for side, (owner, what) in _SIDES.items() if side not in checkers]
    unique = {problem.message: problem for problem in reversed(problems)}
    return CheckReport(config, list(unique.values())[::-1], rows, notes, missing)


@contextmanager
def _deprecations(notes: list[str]) -> Iterator[None]:
    """Turn our deprecation warnings into notes, once each; other warnings pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MilesDeprecationWarning)
        yield
    for warning in caught:
        if not issubclass(warning.category, MilesDeprecationWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif str(warning.message) not in notes:
            notes.append(str(warning.message))


def derive(config: RunConfig) -> RunConfig:
    """Fill in everything that follows from other options; raises `ConfigError` when the batch knobs cannot hold."""
    return _derive_others(derive_batch(config), _checkers([]))


def _derive_others(config: RunConfig, checkers: dict[str, tuple[str, Any]]) -> RunConfig:
    config = derive_rollout(config)
    for _, module in checkers.values():
        if hasattr(module, "derived"):
            config = config.replace(DERIVED, **module.derived(config))
    return config


def idle_hooks(config: RunConfig) -> dict[str, str]:
    """Return the hooks that this very run does not call by itself, with the reason."""
    return _idle(config, _checkers([]))


def _idle(config: RunConfig, checkers: dict[str, tuple[str, Any]]) -> dict[str, str]:
    reasons = idle_by_run_options(config)
    for _, module in checkers.values():
        reasons |= module.idle(config)
    return reasons


def _checkers(problems: list[Problem]) -> dict[str, tuple[str, Any]]:
    """Return each installed package's distribution and check module, by side."""
    found: dict[str, tuple[str, Any]] = {}
    for side, points in sorted(entry_points("miles.checks").items()):
        owner = points[0].dist.name if points[0].dist else points[0].value
        try:
            found[side] = (owner, provider("miles.checks", side))
        except MilesError as error:
            problems += _problems([str(error)], owner)
        except ImportError as error:
            problems += _problems([f"the checks of {owner} cannot be imported: {error}"], owner)
    return found


def _found_by(module: Any, config: RunConfig) -> Iterator[str]:
    try:
        yield from module.check(config)
    except MilesError as error:
        yield str(error)


def _uncalled(config: RunConfig, checkers: dict[str, tuple[str, Any]], rows: list[HookRow]) -> list[str]:
    """Mark the hooks that nothing installed calls; return the problems: those whose caller is installed."""
    known = frozenset().union(*(module.HOOKS for _, module in checkers.values()))
    reasons = {
        name: f"nothing installed calls the {name} hook"
        if spec.side in checkers
        else f"{_SIDES[spec.side][0]}, which calls it, is not installed"
        for name, spec in REGISTRY.items()
        if name not in known
    }
    for row in [row for row in rows if row.hook in reasons]:
        row.called, row.note = False, reasons[row.hook]
    return [
        f"{REGISTRY[name].flag} is set, but {reasons[name]}: it would never run"
        for name in configured_hooks(config.args)
        if name in reasons and REGISTRY[name].side in checkers
    ]


def _problems(texts: Iterable[str], package: str) -> Iterator[Problem]:
    """Split texts into problems: lines that are indented belong to the one before."""
    for text in texts:
        for message in re.split(r"\n(?!\s)", text):
            value = _TOML_VALUE.match(message)
            flag = _FLAG.search(message)
            yield Problem(
                message=message,
                package=package,
                flag=flag_of(value[1]) if value else flag[0] if flag else None,
            )
