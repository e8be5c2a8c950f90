"""`miles hooks list`: one line a hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.cli.hooks.words import STAGES, callers, flag_words
from miles_api.hooks import REGISTRY

if TYPE_CHECKING:
    import argparse

    from miles_api.spec import HookSpec

__all__ = ["HELP", "NAME", "configure", "run"]

NAME = "list"
HELP = "one line a hook: stage, name, flag, and which package is missing to call it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    called = callers()
    specs = sorted(REGISTRY.values(), key=lambda spec: STAGES.index(spec.stage))
    if options.json:
        print(msgspec.json.encode([_row(spec, called) for spec in specs]).decode())
        return 0
    name_width = max(len(spec.name) for spec in specs)
    flag_width = max(len(flag_words(spec)) for spec in specs)
    for spec in specs:
        note = "" if spec.name in called else f"  needs miles-{spec.side} to run"
        print(f"{spec.stage:10} {spec.name:{name_width}}  {flag_words(spec):{flag_width}}{note}".rstrip())
    return 0


def _row(spec: HookSpec, called: dict[str, str]) -> dict[str, Any]:
    return {
        "hook": spec.name, "stage": spec.stage, "side": spec.side, "flag": spec.flag, "needs": spec.needs,
        "kind": spec.kind, "many": spec.many, "since": ".".join(map(str, spec.since)), "moment": spec.moment,
        "default": spec.default, "called_by": called.get(spec.name),
        "missing": None if spec.name in called else f"miles-{spec.side}",
    }  # fmt: skip
