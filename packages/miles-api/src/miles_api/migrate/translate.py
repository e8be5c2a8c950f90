"""Flags of a launch script turned into options of the installed packages, each with what became of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.compat import translate
from miles_api.compat.finder import stands_in_for
from miles_api.compat.table import ROOTS
from miles_api.config import option_groups
from miles_api.hook_options import specs_by_field
from miles_api.loading.load import entry_points
from miles_api.migrate.defaults import DEFAULTS
from miles_api.migrate.table import OURS, PREFIXES, THEIRS, program_rule
from miles_api.migrate.verdicts import Drop, Flag, Flags, Lack, Take, Unplaced, Verdict
from miles_api.options import option_kind
from miles_api.parsing.flags import option_strings
from miles_api.parsing.given import COMMAND_LINE, Given, explain

if TYPE_CHECKING:
    from miles_api.migrate.script import Script
    from miles_api.migrate.variables import Argument

__all__ = ["Entry", "Left", "Migration", "migrate"]

_VALUE = re.compile(r"-\d|-\.\d|-$")
_KEYS = ("key", "token", "password", "secret")
_PACKAGES = {"rollout": "miles-rollout", "objective": "miles-train", "router": "miles-router"}
"""An option group of each package."""
_ABSENT = "perhaps an option of a package that is not installed here"
_OUR_DEFAULT = ""
_BESIDE = "where the launch sets PYTHONPATH, set it for `miles` too: hooks are imported by these names"


class Entry(msgspec.Struct):
    """One line of the run file."""

    table: str
    key: str
    value: Any
    place: str
    remark: str = ""
    doubt: str = ""


class Left(msgspec.Struct):
    """A flag that is not in the run file."""

    flag: str
    """With its values."""
    place: str
    reason: str


class Migration(msgspec.Struct):
    """What became of a launch script."""

    script: str
    count: int = 0
    """Flags in the script."""
    entries: list[Entry] = []
    dropped: list[Left] = []
    """Those for which nothing is needed."""
    lacking: list[Left] = []
    """Those that have no counterpart."""
    unfit: list[Left] = []
    """Those whose values do not fit our option."""
    unplaced: list[Left] = []
    """Those that may be options of packages that are not installed."""
    absent: list[str] = []
    """The packages that are not installed."""
    notes: list[str] = []

    @property
    def taken(self) -> int:
        """How many flags of the script are in the run file."""
        return self.count - sum(map(len, (self.dropped, self.lacking, self.unfit, self.unplaced)))

    @property
    def summary(self) -> str:
        """Return the counts in words."""
        return (
            f"{self.count} flags: {self.taken} taken over, {len(self.dropped)} not needed, {len(self.lacking)} without "
            f"counterpart, {len(self.unfit)} with values that do not fit"
            + (f", {len(self.unplaced)} not placed" if self.unplaced else "")
        )

    @property
    def warning(self) -> str:
        """Say which packages are missing and how much that leaves open; empty where all are there."""
        if not self.absent:
            return ""
        return (
            f"{', '.join(self.absent)} {'are' if len(self.absent) > 1 else 'is'} not installed here: their options "
            f"are not known, {len(self.unplaced)} flags could not be placed"
        )


def migrate(script: Script) -> Migration:
    """Find our option for each flag; nothing is raised for flags that have none."""
    flags, notes = _flags(script.arguments)
    result = Migration(script.name, len(flags), notes=[*script.notes, *notes], absent=_missing_packages())
    for flag in flags.values():
        _note(result, flag, _verdict(flag, flags))
    verdict = program_rule(script.program)
    if verdict:
        result.count += 1
        result.lacking.append(Left(script.program, "the launch", verdict.reason))
    _add_defaults(result, flags)
    if any(entry.table == "hooks" and _is_module(entry.value) for entry in result.entries):
        result.notes.append(_BESIDE)
    return result


def _flags(arguments: list[Argument]) -> tuple[Flags, list[str]]:
    """Group words into flags with their values; the last of two counts."""
    flags: Flags = {}
    notes: list[str] = []
    current: Flag | None = None
    for argument in arguments:
        text = argument.text
        if text.startswith("-") and not _VALUE.match(text):
            name, mark, value = text.partition("=")
            if name in flags:
                notes.append(f"{argument.place}: {name} stands twice; this one counts ({flags[name].place} does not)")
            current = Flag(name, [value] if mark else [], argument.place, argument.unknown)
            flags[name] = current
        elif current is None:
            notes.append(f"{argument.place}: {text} belongs to no flag")
        else:
            current.values.append(text)
            current.unknown += argument.unknown
    return flags, notes


def _missing_packages() -> list[str]:
    return [package for group, package in _PACKAGES.items() if group not in option_groups()]


def _verdict(flag: Flag, flags: Flags) -> Verdict:
    if flag.name in OURS:
        return OURS[flag.name](flag, flags)
    names = _fields_by_flag()
    if flag.name in names:
        key = names[flag.name]
        return Take(key, flag.values if flag.values or not flag.name.startswith("--no-") else False)
    if flag.name in THEIRS:
        return THEIRS[flag.name](flag, flags)
    for prefix, rule in PREFIXES.items():
        if flag.name.startswith(prefix):
            return rule(flag, flags)
    if _missing_packages():
        return Unplaced(_ABSENT)
    return Lack("not known here; a hook of yours that reads it brings it as `fn.options`")


def _fields_by_flag() -> dict[str, str]:
    return {name: field for kind in option_groups().values() for name, field in option_strings(kind).items()}


def _note(result: Migration, flag: Flag, verdict: Verdict) -> None:
    left = Left(_shown(flag), flag.place, "")
    if isinstance(verdict, Take):
        _take(result, flag, verdict, left)
        return
    left.reason = verdict.reason
    lists = {Drop: result.dropped, Lack: result.lacking, Unplaced: result.unplaced}
    lists[type(verdict)].append(left)


def _take(result: Migration, flag: Flag, verdict: Take, left: Left) -> None:
    if flag.unknown:
        left.reason = f"depends on {', '.join(flag.unknown)}, which only the running script knows: give {verdict.key}"
        result.unfit.append(left)
        return
    if verdict.key in specs_by_field():
        _take_hook(result, flag, verdict, left)
        return
    if result.absent and not any(verdict.key in kind.__struct_fields__ for kind in option_groups().values()):
        left.reason = f"becomes {verdict.key}, an option of a package that is not installed here"
        result.unplaced.append(left)
        return
    try:
        entry = _entry(verdict.key, verdict.values)
    except _UnfitError as error:
        left.reason = str(error)
        result.unfit.append(left)
        return
    entry.place, entry.remark, entry.doubt = flag.place, verdict.remark, verdict.doubt
    if f"--{verdict.key.replace('_', '-')}" != flag.name:
        entry.remark = f"{flag.name}" + (f": {verdict.remark}" if verdict.remark else "")
    # Two flags may become one option; what stands under its own name counts.
    known = [other for other in result.entries if other.key == entry.key]
    if known:
        result.dropped.append(Left(left.flag, left.place, f"{entry.key} follows from {known[0].place}"))
    else:
        result.entries.append(entry)


def _take_hook(result: Migration, flag: Flag, verdict: Take, left: Left) -> None:
    """Take a hook's reference over, under its short name where it has one; our own default needs none."""
    spec = specs_by_field()[verdict.key][0]
    references = [name.strip() for value in flag.values for name in value.split(",") if name.strip()]
    ours = [_reference(name, spec.name, spec.group) for name in references]
    if not references or (len(references) > 1 and not spec.many):
        left.reason = f"{verdict.key} takes {'references' if spec.many else 'one reference'}"
        result.unfit.append(left)
    elif None in ours:
        missing = ", ".join(name for name, known in zip(references, ours, strict=True) if known is None)
        left.reason = f"{missing} is of the older stack and has no counterpart; `docs/compat.md` lists what has one"
        result.lacking.append(left)
    elif ours == [_OUR_DEFAULT]:
        left.reason = "that is the default here"
        result.dropped.append(left)
    else:
        kept = [name for name in ours if name]
        remark = f"was {', '.join(references)}" if kept != references else ""
        value = kept[0] if len(kept) == 1 else kept
        result.entries.append(Entry("hooks", verdict.key, value, flag.place, remark, verdict.doubt))


def _reference(name: str, hook: str, group: str) -> str | None:
    """Return our name for a reference; None for one that the older stack has and we have not."""
    target = translate(name)
    root = name.replace(":", ".").partition(".")[0]
    if target == name:
        return None if root in ROOTS and "." in name and stands_in_for(root) else name
    own = target.partition(":")[2]
    if not own:
        return target
    places = {point.value for point in entry_points("miles.compat").get(own, [])}
    if any(point.value in places for point in entry_points("miles.defaults").get(hook, [])):
        return _OUR_DEFAULT
    short = [short for short, points in entry_points(group).items() if any(point.value in places for point in points)]
    # Without a short name the old name goes on working.
    return short[0] if short else name


def _is_module(value: Any) -> bool:
    references = value if isinstance(value, list) else [value]
    return any("." in reference and not reference.partition(":")[0].endswith(".py") for reference in references)


class _UnfitError(Exception):
    """A value that our option does not take."""


def _entry(key: str, values: Any) -> Entry:
    """Convert words to what our option takes."""
    for table, kind in option_groups().items():
        for info in msgspec.structs.fields(kind):
            if info.name == key:
                return Entry(table, key, _converted(info, values), "")
    raise _UnfitError(f"no option is named {key}")


def _converted(info: msgspec.structs.FieldInfo, values: Any) -> Any:
    shape = option_kind(info.type)
    if shape.secret:
        raise _UnfitError(f"{info.name} is a secret: give it on the command line or in the environment")
    raw = _raw(info.name, shape.base, values)
    try:
        return msgspec.to_builtins(msgspec.convert(raw, info.type, strict=False))
    except (msgspec.ValidationError, ValueError) as error:
        shown = " ".join(values) if isinstance(values, list) else values
        choices = shape.base if isinstance(shape.base, tuple) else ()
        text = explain(info.name, Given(shown, COMMAND_LINE), error, choices)
        raise _UnfitError(text.partition(f"{shown!r}: ")[2] or text) from error


def _raw(name: str, base: Any, values: Any) -> Any:
    if not isinstance(values, list) or base is list:
        return values
    if base is bool:
        if values:
            raise _UnfitError(f"{name} is a switch and takes no value")
        return True
    if len(values) != 1:
        raise _UnfitError(f"{name} takes one value, not {len(values)}")
    if base is dict:
        try:
            return msgspec.json.decode(values[0])
        except msgspec.DecodeError as error:
            raise _UnfitError(f"{name} takes JSON: {error}") from error
    return values[0]


def _add_defaults(result: Migration, flags: Flags) -> None:
    """Write down where the older stack does otherwise than ours when a script says nothing."""
    written = {entry.key for entry in result.entries}
    known = {field for kind in option_groups().values() for field in kind.__struct_fields__}
    for default in DEFAULTS:
        skipped = (default.beside and default.beside not in flags) or not default.applies(flags)
        if default.flag in flags or default.key in written or default.key not in known or skipped:
            continue
        entry = _entry(default.key, flags[default.like].values if default.like in flags else default.value)
        entry.remark = default.remark
        result.entries.append(entry)


def _shown(flag: Flag) -> str:
    """Return the flag as written; keys and tokens are not repeated."""
    secret = any(part in _KEYS for part in flag.name.strip("-").split("-")) and flag.name.startswith("--wandb")
    return " ".join([flag.name, *(["…"] if secret and flag.values else flag.values)])
