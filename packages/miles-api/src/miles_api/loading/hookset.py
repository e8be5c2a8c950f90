"""The hooks of one process: resolved together, before anything starts, with our defaults loaded the same way."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.abi import shown
from miles_api.errors import ConfigError, HookError
from miles_api.hooks import REGISTRY
from miles_api.loading.beside import BESIDE, beside
from miles_api.loading.bind import DEFAULT, BoundHook, bind, resolve
from miles_api.loading.load import entry_points, provider

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from miles_api.args import Args
    from miles_api.spec import HookSpec

__all__ = ["HookSet", "close", "configured_hooks", "differs", "report_of"]


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
    needed = {other.needs for other in REGISTRY.values() if other.flag == spec.flag and other.needs}
    switches = [switch.removeprefix("--").replace("-", "_") for switch in needed]
    # The switch is another package's option, which may not be installed.
    turned = any(switch in args and getattr(args, switch) for switch in switches)
    return turned if spec.needs else not turned


class HookSet:
    """Resolve the named hooks; `ConfigError` lists every one that does not load or fit.

    Callable classes are built here, once, with their own view of `args` if they take one. With `build=False` nothing is
    built: that is for checks, where a class may be expensive to build or need what only the run has. Hooks that share
    (`eval_rollout` with `rollout`) and name the same reference get one view and one instance.
    """

    def __init__(self, args: Args, names: Iterable[str], *, build: bool = True) -> None:
        self._args = args
        self._build = build
        self._bound: dict[str, list[BoundHook]] = {}
        self._views: dict[tuple[str, str], Args] = {}
        self._instances: dict[tuple[str, str], Any] = {}
        configured = configured_hooks(args)
        problems: list[str] = []
        for name in names:
            try:
                self._bound[name] = self._load(REGISTRY[name], configured.get(name, []))
            except HookError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))

    def _load(self, spec: HookSpec, references: list[str]) -> list[BoundHook]:
        hooks = [resolve(spec, reference, self._view(spec, reference)) for reference in references]
        if not hooks and spec.name in entry_points("miles.defaults"):
            default = provider("miles.defaults", spec.name)
            hooks = [bind(spec, DEFAULT, default, self._view(spec, DEFAULT))]
        if spec.name in BESIDE:
            hooks = self._beside(spec)
        # Class forms and class hooks are built by who calls them, from what they are given.
        return [self._built(hook) if self._build and not isinstance(hook.form.stub, type) else hook for hook in hooks]

    def _beside(self, spec: HookSpec) -> list[BoundHook]:
        """Find a hook without a flag in the module of the one it belongs to, which is named before it."""
        found = [beside(spec.name, owner, self._args.fork()) for owner in self._bound.get(BESIDE[spec.name][0], [])]
        return [hook for hook in found if hook is not None]

    def _view(self, spec: HookSpec, reference: str) -> Args:
        return self._views.setdefault(_shared_key(spec, reference), self._args.fork())

    def _built(self, hook: BoundHook, *arguments: Any) -> BoundHook:
        if not hook.constructs:
            return hook
        key = _shared_key(hook.spec, hook.reference)
        if key not in self._instances:
            made = hook.built(*arguments) if arguments else _built_with_args(hook)
            self._instances[key] = made.target
        return hook.calling(self._instances[key])

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

    def build(self, name: str, *arguments: Any) -> BoundHook | None:
        """Build the class behind `name` from what its caller gives it, once, and return the hook ready to be called.

        A function is returned as it is, and None where there is no hook. A hook that shares with another one, under the
        same reference, gets the instance that was built for that one.
        """
        hook = self.one(name)
        if hook is not None:
            self._bound[name][0] = hook = self._built(hook, *arguments)
        return hook

    def report(self) -> list[dict[str, Any]]:
        """Say what was loaded, from where, and how it fared: one plain dict a hook, for `hooks.json`."""
        return [report_of(hook) for hooks in self._bound.values() for hook in hooks]

    async def aclose(self) -> None:
        """Call `aclose()` or `close()` of every hook that is an instance and has one, once each, last built first.

        All are closed whatever one of them raises; then the first exception is raised, with the hook's name.
        """
        hooks = [hook for hooks in self._bound.values() for hook in hooks if not inspect.isroutine(hook.target)]
        failed: list[Exception] = []
        for hook in {id(hook.target): hook for hook in reversed(hooks)}.values():
            try:
                await close(hook.target)
            except Exception as error:
                error.add_note(f"raised while the {hook.spec.name} hook {hook.reference} was closed")
                failed.append(error)
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Do what `aclose` does, in a process without an event loop."""
        asyncio.run(self.aclose())


def report_of(hook: BoundHook) -> dict[str, Any]:
    """Return what `hooks.json` says of one hook: identity, origin, ABI, and how it fared so far."""
    return {
        "hook": hook.spec.name,
        "flag": hook.spec.flag,
        "reference": hook.reference,
        "configured": hook.configured,
        "moment": hook.spec.moment,
        "abi": shown(hook.abi.version),
        "checkable": hook.checkable,
        **msgspec.structs.asdict(hook.origin),
        **msgspec.structs.asdict(hook.stats),
        "args_written": sorted(hook.view.overlay()) if hook.view is not None else [],
    }


def differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Compare where two processes loaded the same hook from, as `report_of` says; None if it is the same code.

    A file's place may differ between machines, its contents, distribution and version may not. Where the reports have a
    `process`, the text names it.
    """
    for field, what in (("sha256", "file hash"), ("distribution", "distribution"), ("version", "version")):
        if a[field] != b[field]:
            here, there = (f"{side[field] or 'none'} in {_where(side)}" for side in (a, b))
            return f"the {a['hook']} hook {a['reference']} is not the same everywhere: {what} {here}, {there}"
    return None


def _where(report: Mapping[str, Any]) -> str:
    return f"{report['process']} ({report['file']})" if "process" in report else str(report["file"])


async def close(target: Any) -> None:
    """Await `target.aclose()`, or call `target.close()`, if there is one."""
    if isinstance(target, type):
        return
    if hasattr(target, "aclose"):
        await target.aclose()
    elif hasattr(target, "close"):
        target.close()


def _shared_key(spec: HookSpec, reference: str) -> tuple[str, str]:
    return spec.shares or spec.name, reference


def _built_with_args(hook: BoundHook) -> BoundHook:
    """Build a callable class from its view of `args`, or from nothing if it takes none."""
    try:
        inspect.signature(hook.target, follow_wrapped=False).bind(hook.view)
    except TypeError:
        return hook.built()
    return hook.built(hook.view)
