"""Option groups: frozen Structs from which flags, help, bounds, TOML keys and defaults are derived.

A package offers a group under the entry-point group `miles.options`; the entry point's name is the TOML table.
A field `rollout_batch_size: Annotated[int, Meta(ge=1)] = 32` followed by a docstring gives `--rollout-batch-size`,
its bound, its default and its help. Every field needs a default; `None` means "not given".
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

__all__ = ["Options", "OutputPath", "References", "UserPath", "field_docs", "flag_of", "option_kind", "options_from"]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of every option group."""


UserPath = Annotated[str, msgspec.Meta(extra={"path": "input"})]
"""An existing file or directory; in a TOML file a relative one is looked up beside that file first."""
OutputPath = Annotated[str, msgspec.Meta(extra={"path": "output"})]
"""A path that the run creates; in a TOML file a relative one is relative to that file."""
References = Annotated[dict[str, float], msgspec.Meta(extra={"path": "references"})]
"""A number for each of several hooks, by reference: `path/file.py:fn` is looked up as in a hook's own option."""


def flag_of(name: str) -> str:
    """Return the command-line spelling of a field: `rollout_batch_size` → `--rollout-batch-size`."""
    return "--" + name.replace("_", "-")


@functools.cache
def field_docs(cls: type[msgspec.Struct]) -> dict[str, str]:
    """Return the docstring under each field of `cls`, read from its source; fields without one are left out."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not (isinstance(base, type) and issubclass(base, msgspec.Struct)) or base in (msgspec.Struct, Options):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            docs.update(base.__dict__.get("__field_docs__", {}))
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for field, doc in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(doc.value.value))
    return docs


class OptionKind(msgspec.Struct, frozen=True):
    """How a field's type reads on a command line."""

    base: Any
    """`int`, `float`, `str`, `bool`, `list`, `dict`, or a tuple of Literal choices."""
    optional: bool
    path: str
    """`input`, `output`, `references` (hooks, as the keys of a dict) or empty."""
    secret: bool = False
    """True for a token or password: never written to a file."""


def option_kind(annotation: Any) -> OptionKind:
    """Reduce an annotation (`Annotated`, `Optional`, `Literal`, `list[…]`) to what argparse needs."""
    optional, path, secret = False, "", False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *metas = get_args(annotation)
            for meta in metas:
                extra = getattr(meta, "extra", None) or {}
                path, secret = extra.get("path", path), extra.get("secret", secret)
        elif origin in (Union, types.UnionType):
            some = [a for a in get_args(annotation) if a is not type(None)]
            optional = optional or len(some) < len(get_args(annotation))
            if len(some) != 1:
                return OptionKind(str, optional, path, secret)
            annotation = some[0]
        elif origin is Literal:
            return OptionKind(get_args(annotation), optional, path, secret)
        else:
            return OptionKind(origin or annotation, optional, path, secret)


def options_from(args: Any, kind: type[msgspec.Struct]) -> Any:
    """Rebuild one typed group from the flat `args`: how our own hooks get back to types."""
    return kind(**{field: getattr(args, field) for field in kind.__struct_fields__})
