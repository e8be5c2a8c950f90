"""`miles hooks check REF --as NAME`: does it load, does it fit, does it behave?"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api import testing
from miles_api.cli.hooks.words import find_spec, flag_words
from miles_api.errors import ConfigError, DataError, HookError, HookLoadError, SampleError, did_you_mean
from miles_api.loading.bind import BoundHook, resolve
from miles_api.loading.load import TRAINER_PACKAGES
from miles_api.packing.frames import MAGIC, looks_like
from miles_api.parsing.given import Given
from miles_api.record import RecordedRollout, read_dump
from miles_api.rollout_types import flatten
from miles_api.sample import Sample

if TYPE_CHECKING:
    from miles_api.spec import HookSpec

__all__ = ["HELP", "NAME", "configure", "run"]

NAME = "check"
HELP = "load a hook, compare it with its stub, call it on made-up inputs"
_OK, _FAILED, _REFUSED = 0, 1, 2
_SOURCE = "--set"
_EPILOG = """\
A hook that may act on the world outside (post_save, rollout_log, agent, execute_tool, …) or that needs a run's data
(rollout, data_source) is only compared with its stub, unless --call is given.

exit codes:
  0  nothing is wrong, or it could only be compared with its stub
  1  it fits, and a conformance check failed
  2  it does not load, does not fit, or the arguments are wrong

--json prints one object: {"hook", "reference", "ok", "fits", "called", "passed", "left_out"?, "note"?, "problem"?,
"check"?, "sample"?, "field"?}"""


class _Verdict(msgspec.Struct):
    """What is said of one hook; what is empty is left out of the JSON object."""

    hook: str
    reference: str
    ok: bool = True
    fits: bool = True
    called: bool = False
    passed: list[str] = []
    left_out: str = ""
    note: str = ""
    problem: str = ""
    check: str | None = None
    sample: int | None = None
    field: str | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("reference", metavar="REF", help="path/file.py:fn, pkg.mod:fn or a short name")
    parser.add_argument("--as", dest="hook", metavar="NAME", required=True, help="the hook that it is meant to be")
    parser.add_argument("--call", action=argparse.BooleanOptionalAction, help="call it, or never; see below")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                        help="an option that it reads from args: JSON or text (repeat the flag for each)")  # fmt: skip
    parser.add_argument(
        "--samples", metavar="FILE", help="a dump, or JSON lines with a Sample's fields, in place of made-up ones"
    )
    parser.add_argument("--json", action="store_true", help="print one object")


def run(options: argparse.Namespace) -> int:
    """Check the hook and say what was found."""
    spec = find_spec(options.hook)
    given = dict(_setting(text) for text in options.settings)
    samples = None if options.samples is None else _read_samples(options.samples)
    verdict = _Verdict(spec.name, options.reference)
    # What the hook prints would end up in the middle of the verdict.
    with contextlib.redirect_stdout(sys.stderr):
        code = _check(spec, options, verdict, given, samples)
    if options.json:
        said = {key: value for key, value in msgspec.structs.asdict(verdict).items() if value not in (None, "")}
        print(msgspec.json.encode(said).decode())
    elif code == _OK:
        print("\n".join(_lines(spec, verdict)))
    else:
        print(f"miles hooks check: {verdict.problem}", file=sys.stderr)
    return code


def _check(
    spec: HookSpec,
    options: argparse.Namespace,
    verdict: _Verdict,
    given: dict[str, Given],
    samples: list[Sample] | None,
) -> int:
    try:
        bound = resolve(spec, options.reference)
    except HookError as error:
        missing = error.missing if isinstance(error, HookLoadError) else None
        if spec.side == "train" and missing in TRAINER_PACKAGES:
            verdict.fits, verdict.note = (
                False,
                f"not checked: {missing} is not installed here, and a trainer rank has it",
            )
            return _OK
        verdict.ok, verdict.fits, verdict.problem = False, False, str(error)
        return _REFUSED
    if spec.kind != "value" and not bound.checkable:
        verdict.note = "its signature says nothing: miles passes it everything"
    acts = testing.case_of(spec.name, spec.stage).acts
    if options.call is False or (options.call is None and acts):
        verdict.note = "only compared with its stub; --call calls it on made-up inputs"
        return _OK
    return _call(bound, options, verdict, given, samples)


def _call(
    bound: BoundHook,
    options: argparse.Namespace,
    verdict: _Verdict,
    given: dict[str, Given],
    samples: list[Sample] | None,
) -> int:
    try:
        report = testing.check_bound(bound, given, samples)
    except testing.ConformanceSkip as skipped:
        verdict.note = str(skipped)
        return _OK
    except testing.ConformanceError as error:
        verdict.ok, verdict.called, verdict.problem = False, True, str(error)
        verdict.check, verdict.sample, verdict.field = error.check, error.sample, error.field
        if error.__cause__ is not None and not options.json:
            _print_traceback(error.__cause__)
        return _FAILED
    verdict.called, verdict.passed, verdict.left_out = True, report.passed, report.left_out
    verdict.note = "; ".join(note for note in [verdict.note, *report.notes] if note)
    return _OK


def _print_traceback(error: BaseException) -> None:
    """Print an exception from the hook's own first frame on: ours say nothing to its author."""
    own = testing.users_part(error)
    if own is not None:
        traceback.print_exception(type(error), error, own)


def _lines(spec: HookSpec, verdict: _Verdict) -> list[str]:
    fits = f"fits the hook {spec.name}, {flag_words(spec)}" if verdict.fits else "was not loaded"
    lines = [f"{verdict.reference} {fits}", *(f"  ok  {check}" for check in verdict.passed)]
    if verdict.note:
        lines.append(f"note: {verdict.note}")
    if verdict.left_out:
        lines.append(f"not seen here: {verdict.left_out}")
    return lines


def _setting(text: str) -> tuple[str, Given]:
    name, mark, value = text.partition("=")
    if not mark:
        raise ConfigError(f"--set {text}: expected KEY=VALUE")
    try:
        decoded: Any = msgspec.json.decode(value)
    except msgspec.DecodeError:
        decoded = value
    return name.removeprefix("--").replace("-", "_"), Given(decoded, _SOURCE)


def _read_samples(path: str) -> list[Sample]:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"--samples {path}: there is no such file")
    with file.open("rb") as opened:
        start = opened.read(16)
    samples = _dumped_samples(path) if start.startswith(MAGIC) else _written_samples(path, start)
    if not samples:
        raise DataError(f"--samples {path} holds no samples")
    return samples


def _dumped_samples(path: str) -> list[Sample]:
    dump = read_dump(path)
    groups = [group.samples for record in dump if isinstance(record, RecordedRollout) for group in record.groups]
    if dump.damage:
        print(f"warning: {dump.damage}", file=sys.stderr)
    return flatten(groups)


def _written_samples(path: str, start: bytes) -> list[Sample]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"--samples {path} is neither a dump nor JSON lines: {looks_like(start)}") from error
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
            _require_no_slips(fields)
            samples.append(Sample.from_dict(fields))
        except (msgspec.DecodeError, SampleError) as error:
            raise DataError(f"--samples {path}, line {number}: {error}") from error
    return samples


def _require_no_slips(fields: dict[str, Any]) -> None:
    """Refuse what is nearly the name of a field: the hook would silently miss it."""
    known = Sample.__struct_fields__
    for key in fields:
        near = "" if key in known or key == "extra" else did_you_mean(key, known)
        if near:
            raise SampleError(f'{key!r} is no field of a Sample{near} An attribute of your own may stand under "extra"')
