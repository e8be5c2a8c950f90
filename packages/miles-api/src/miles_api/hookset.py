"""The hooks of one process: resolved together, before anything starts, with our defaults loaded the same way."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.bind import BoundHook, bind, resolve
from miles_api.errors import ConfigError, HookError
from miles_api.hooks import REGISTRY
from miles_api.load import entry_points, provider

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miles_api.args import Args
    from miles_api.spec import HookSpec

__all__ = ["HookSet", "close", "configured_hooks", "report_of"]


def configured_hooks(args: Args) -> dict[str, list[str]]:
    """Return the references that the options name, by hook, in their order."""
    found: dict[str, list[str]] = {}
    for spec in REGISTRY.values():
        if spec.field is None or not _is_meant(spec, args):
            continue
        value = getattr(args, spec.field)
        if value:
            found[spec.name] = value if isinstance(value, list) else [value]
    return found


def _is_meant(spec: HookSpec, args: Args) -> bool:
    """Choose between the two hooks of one flag: `--group-rm` turns the reward hook into a group reward."""
    switches = {other.needs for other in REGISTRY.values() if other.flag == spec.flag and other.needs}
    turned = any(getattr(args, switch.removeprefix("--").replace("-", "_")) for switch in switches)
    return turned if spec.needs else not turned


class HookSet:
    """Resolve the named hooks; `ConfigError` lists every one that does not load or fit.

    Callable classes are built here, once, with their own view of `args` if they take one. With `build=False` nothing is
    built: that is for checks, where a class may be expensive to build or need what only the run has.
    """

    def __init__(self, args: Args, names: Iterable[str], *, build: bool = True) -> None:
        self._args = args
        self._bound: dict[str, list[BoundHook]] = {}
        configured = configured_hooks(args)
        problems: list[str] = []
        for name in names:
            try:
                hooks = [resolve(REGISTRY[name], ref, args.fork()) for ref in configured.get(name, [])]
                if not hooks and name in entry_points("miles.defaults"):
                    hooks = [bind(REGISTRY[name], "default", provider("miles.defaults", name), args.fork())]
                self._bound[name] = [_built(hook) if build else hook for hook in hooks]
            except HookError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    def one(self, name: str) -> BoundHook | None:
        """Return the hook configured under `name`, its default, or None where there is neither."""
        hooks = self._bound[name]
        return hooks[0] if hooks else None

    def need(self, name: str) -> BoundHook:
        """Return the hook under `name`; `ConfigError` when there is neither a configured one nor a default."""
        hook = self.one(name)
        if hook is None:
            raise ConfigError(f"no installed package offers a default {name} hook; set {REGISTRY[name].flag}")
        return hook

    def many(self, name: str) -> list[BoundHook]:
        """Return all hooks configured under `name`, in order."""
        return self._bound[name]

    def report(self) -> list[dict[str, Any]]:
        """Say what was loaded, from where, and how it fared: one plain dict a hook, for `hooks.json`."""
        return [report_of(hook) for hooks in self._bound.values() for hook in hooks]

    async def aclose(self) -> None:
        """Call `aclose()` or `close()` of every hook that was built from a class and has one."""
        for hook in [hook for hooks in self._bound.values() for hook in hooks if not inspect.isroutine(hook.target)]:
            await close(hook.target)


def report_of(hook: BoundHook) -> dict[str, Any]:
    """Return what `hooks.json` says of one hook."""
    return {
        "hook": hook.spec.name,
        "reference": hook.reference,
        **msgspec.structs.asdict(hook.origin),
        **msgspec.structs.asdict(hook.stats),
        "args_written": sorted(hook.view.overlay()) if hook.view is not None else [],
    }


async def close(target: Any) -> None:
    """Await `target.aclose()`, or call `target.close()`, if there is one."""
    if isinstance(target, type):
        return
    if hasattr(target, "aclose"):
        await target.aclose()
    elif hasattr(target, "close"):
        target.close()


def _built(hook: BoundHook) -> BoundHook:
    """Build a callable class. Class forms and class hooks are built by who calls them, from what they are given."""
    if not hook.constructs or isinstance(hook.form.stub, type):
        return hook
    try:
        inspect.signature(hook.target, follow_wrapped=False).bind(hook.view)
    except TypeError:
        return hook.built()
    return hook.built(hook.view)
