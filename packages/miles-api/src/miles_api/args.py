"""`Args`: the flat, read-only view of all options that hooks receive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Args"]


class Args:
    """Read any option by name. A write lands in this view's own overlay and nobody else sees it.

    The overlay exists because hooks written for other stacks keep state on `args`; `overlay()` lists what was written.
    Copies and pickles carry the overlay along.
    """

    __slots__ = ("_options", "_overlay")

    def __init__(self, options: Mapping[str, Any], overlay: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_options", options)
        object.__setattr__(self, "_overlay", dict(overlay or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._overlay:
            return self._overlay[name]
        try:
            return self._options[name]
        except KeyError:
            raise AttributeError(f"args has no option {name!r}{did_you_mean(name, self._options)}") from None

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
        return f"Args({len(self._options)} options, {len(self._overlay)} written)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Args, (dict(self._options), dict(self._overlay))

    def __copy__(self) -> Args:
        return Args(self._options, self._overlay)

    def overlay(self) -> dict[str, Any]:
        """Return what was written to this view, by name."""
        return dict(self._overlay)

    def fork(self) -> Args:
        """Return a view of the same options with an empty overlay: one for each hook reference."""
        return Args(self._options)
