"""`miles hooks list | show NAME`: the hook table, from the stubs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from miles_api.errors import ConfigError, did_you_mean
from miles_api.hooks import REGISTRY
from miles_api.load import entry_points

if TYPE_CHECKING:
    import argparse

    from miles_api.spec import HookSpec

__all__ = ["command"]

_STAGES = ("rollout", "reward", "filtering", "conversion", "training", "megatron", "logging", "routing", "model",
           "agents")  # fmt: skip


class _HooksCommand:
    help = "list every hook, or show one with its signature"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("list", help="one line a hook")
        actions.add_parser("show", help="one hook in full").add_argument("name")

    def run(self, options: argparse.Namespace) -> int:
        print(_table() if options.action == "list" else _page(_find(options.name)))
        return 0


def _flag(spec: HookSpec) -> str:
    return " ".join(part for part in (spec.flag, spec.needs) if part) or "(beside the agent hook)"


def _table() -> str:
    specs = sorted(REGISTRY.values(), key=lambda spec: _STAGES.index(spec.stage))
    width = max(len(spec.name) for spec in specs)
    return "\n".join(f"{spec.stage:10} {spec.name:{width}}  {_flag(spec)}" for spec in specs)


def _find(name: str) -> HookSpec:
    if name not in REGISTRY:
        raise ConfigError(f"there is no hook {name!r}{did_you_mean(name, REGISTRY)}")
    return REGISTRY[name]


def _page(spec: HookSpec) -> str:
    lines = [f"{spec.name}  {_flag(spec)}", f"since ABI {spec.since[0]}.{spec.since[1]}, runs on the {spec.side} side"]
    lines += ["", spec.doc, ""]
    lines += [inspect.getsource(form.stub).strip() for form in spec.forms]
    named = sorted(entry_points(spec.group))
    return "\n".join([*lines, "", f"default: {spec.default}", f"short names installed: {', '.join(named) or 'none'}"])


command = _HooksCommand()
