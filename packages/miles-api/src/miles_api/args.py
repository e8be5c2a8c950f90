"""`Args`: the flat, read-only view of all options that hooks receive."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from miles_api.errors import did_you_mean
from miles_api.older_options import older_option
from miles_api.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Args", "NoSuchOption"]


class NoSuchOption(AttributeError):  # noqa: N818  hook authors read the name, beside `AttributeError`
    """A hook asks `args` for a name that is no option.

    The nearest name is found when it is shown: `getattr(args, "mine", None)` in a hook need not wait for that.
    """

    def __str__(self) -> str:
        if self.name in Sample.__struct_fields__:
            return f"args has no option {self.name!r}, a sample has it: args is a hook's first parameter"
        return f"args has no option {self.name!r}{did_you_mean(str(self.name), self.obj)}"  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return AttributeError, (str(self),)


class Args:
    """Read any option by name. A write lands in this view's own overlay and nobody else sees it.

    The overlay exists because hooks written for other stacks keep state on `args`; `overlay()` lists what was written.
    Lists and dicts are handed out as this view's own copies, so that `args.rollout_stop.append(…)` is such a write too.
    Copies and pickles carry the overlay along.
    """

    __slots__ = ("_copies", "_options", "_overlay")

    def __init__(self, options: Mapping[str, Any], overlay: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_options", options)
        object.__setattr__(self, "_overlay", dict(overlay or {}))
        object.__setattr__(self, "_copies", {})

    def __getattr__(self, name: str) -> Any:
        if name in self._overlay:
            return self._overlay[name]
        try:
            value = self._options[name]
        except KeyError:
            return self._older(name)
        if type(value) is list or type(value) is dict:
            # Threads may be first at the same time: all of them must get the same copy.
            return self._copies[name] if name in self._copies else self._copies.setdefault(name, copy.deepcopy(value))
        return value

    def _older(self, name: str) -> Any:
        """Return an option that only older stacks have."""
        try:
            return older_option(name, self._options)
        except KeyError:
            raise NoSuchOption(name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._overlay[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self._overlay:
            raise AttributeError(f"args.{name} was not written by this hook")
        del self._overlay[name]

    def __contains__(self, name: str) -> bool:
        return name in self._overlay or name in self._options

    def __iter__(self) -> Iterator[str]:
        return iter({**self._options, **self._overlay})

    def __dir__(self) -> list[str]:
        return sorted(self)

    def __repr__(self) -> str:
        return f"Args({len(self._options)} options, {len(self.overlay())} written)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Args, (dict(self._options), self.overlay())

    def __copy__(self) -> Args:
        return Args(self._options, self.overlay())

    def overlay(self) -> dict[str, Any]:
        """Return what was written to this view, by name."""
        changed = {name: value for name, value in self._copies.items() if value != self._options[name]}
        return {**changed, **self._overlay}

    def fork(self) -> Args:
        """Return a view of the same options with an empty overlay: one for each hook reference."""
        return Args(self._options)
