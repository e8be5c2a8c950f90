"""The hooks of a plan: every configured one resolved, whether this run calls it or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.abi import shown
from miles_api.errors import HookError, HookLoadError
from miles_api.hooks import REGISTRY
from miles_api.loading.beside import BESIDE, beside
from miles_api.loading.bind import BoundHook, resolve
from miles_api.loading.hookset import configured_hooks
from miles_api.loading.load import TRAINER_PACKAGES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miles_api.config import RunConfig
    from miles_api.spec import HookSpec

__all__ = ["HookRow", "part_rows", "rows_of"]


class HookRow(msgspec.Struct, kw_only=True):
    """One configured hook, as `miles check --json` shows it."""

    hook: str
    flag: str | None
    reference: str
    file: str = ""
    sha256: str = ""
    distribution: str = ""
    version: str = ""
    abi: str = ""
    """The ABI it was written for; empty where it could not be imported here."""
    checkable: bool = False
    """False where nothing could be compared with the stub: a bare `(*args, **kwargs)`, or not imported here."""
    called: bool = True
    """Whether this run calls it by itself."""
    note: str = ""
    """Why it is not called, or where it will be checked."""
    part_of: str = ""
    """The hook that calls it, for one that is named in options of its own; the run counts the calls of that one."""


def rows_of(config: RunConfig, idle: dict[str, str]) -> tuple[list[HookRow], list[str]]:
    """Resolve every configured hook; return the rows of those that can run, and what is wrong with the others."""
    rows: list[HookRow] = []
    problems: list[str] = []
    for name, references in configured_hooks(config.args).items():
        spec = REGISTRY[name]
        for reference in references:
            try:
                rows += _found(spec, reference)
            except HookError as error:
                if spec.side == "train" and (lacking := _trainer_package(error)):
                    rows.append(_deferred(spec, reference, lacking))
                else:
                    problems.append(str(error))
    for row in rows:
        if row.hook in idle:
            row.called, row.note = False, "; ".join(filter(None, (idle[row.hook], row.note)))
    return rows, problems


def part_rows(parts: Iterable[tuple[str, BoundHook]]) -> list[HookRow]:
    """Return the rows of hooks that others call, each given with the short name of the one that does."""
    rows = []
    for whole, bound in parts:
        row = _row(bound)
        row.flag, row.part_of, row.note = None, whole, f"called by {whole}"
        rows.append(row)
    return rows


def _found(spec: HookSpec, reference: str) -> list[HookRow]:
    bound = resolve(spec, reference)
    rows = [_row(bound)]
    found = [beside(name, bound) for name, (owner, _) in BESIDE.items() if owner == spec.name]
    return rows + [_row(hook) for hook in found if hook is not None]


def _row(bound: BoundHook) -> HookRow:
    return HookRow(
        hook=bound.spec.name,
        flag=bound.spec.flag,
        reference=bound.reference,
        abi=shown(bound.abi.version),
        checkable=bound.checkable,
        **msgspec.structs.asdict(bound.origin),
    )


def _trainer_package(error: HookError) -> str | None:
    """Return the package whose absence alone kept a hook of the trainer from being imported, or None."""
    missing = error.missing if isinstance(error, HookLoadError) else None
    return missing if (missing or "").partition(".")[0] in TRAINER_PACKAGES else None


def _deferred(spec: HookSpec, reference: str, missing: str) -> HookRow:
    """Say of a hook that a trainer rank will check it, and hash the file that defines it: not always the one named."""
    file = Path(reference.rpartition(":")[0])
    row = HookRow(hook=spec.name, flag=spec.flag, reference=reference)
    if file.suffix == ".py" and file.is_file():
        row.file = str(file)
    row.note = f"checked on a trainer rank: {missing} is not installed here"
    return row
