"""`HookOptions`: one `--*-path` option for each flag in the hook table, derived from the stubs."""

from __future__ import annotations

from typing import Any

import msgspec

from miles_api.hooks import REGISTRY
from miles_api.options import Options

__all__ = ["HookOptions", "specs_by_field"]


def specs_by_field() -> dict[str, list[Any]]:
    """Return the hooks behind each `*_path` option; `custom_rm_path` serves two, told apart by `--group-rm`."""
    found: dict[str, list[Any]] = {}
    for spec in REGISTRY.values():
        if spec.field:
            found.setdefault(spec.field, []).append(spec)
    return found


def _help(specs: list[Any]) -> str:
    spec = specs[0]
    several = " (several: comma-separated, or a TOML list)" if spec.many else ""
    return f"{spec.doc.splitlines()[0]}{several} Default: {spec.default}."


HookOptions: type[Options] = msgspec.defstruct(  # type: ignore[assignment]
    "HookOptions",
    [(field, (str | list[str] | None) if specs[0].many else (str | None), None)
     for field, specs in specs_by_field().items()],
    bases=(Options,),
    namespace={"__field_docs__": {field: _help(specs) for field, specs in specs_by_field().items()}},
    module=__name__,
    frozen=True,
    kw_only=True,
)  # fmt: skip
"""References to user code: a short name, `pkg.mod:fn` or `path/file.py:fn`."""
