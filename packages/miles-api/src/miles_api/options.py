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
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ForeignOptions",
    "Options",
    "OutputPath",
    "References",
    "UserPath",
    "field_docs",
    "flag_of",
    "foreign_fields",
    "option_kind",
    "options_from",
    "own_fields",
]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of every option group."""


UserPath = Annotated[str, msgspec.Meta(extra={"path": "input"})]
"""An existing file or directory; in a TOML file a relative one is looked up beside that file first."""
OutputPath = Annotated[str, msgspec.Meta(extra={"path": "output"})]
"""A path that the run creates; in a TOML file a relative one is relative to that file."""
References = Annotated[dict[str, float], msgspec.Meta(extra={"path": "references"})]
"""A number for each of several hooks, by reference: `path/file.py:fn` is looked up as in a hook's own option."""

ForeignOptions = Annotated[dict[str, Any], msgspec.Meta(extra={"foreign": True})]
"""The options of another program, by its own names, in a group that is named after that program.

Every `--GROUP-name` and every key of the table `[GROUP]` that is no option of ours ends up here, unread: the package
that owns the group asks the program itself, in its check. Hooks find each as `args.GROUP_name`.
"""


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
    foreign: bool = False
    """True for `ForeignOptions`: no flag of its own."""


def option_kind(annotation: Any) -> OptionKind:
    """Reduce an annotation (`Annotated`, `Optional`, `Literal`, `list[…]`) to what argparse needs."""
    optional, path, secret, foreign = False, "", False, False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *metas = get_args(annotation)
            for meta in metas:
                extra = getattr(meta, "extra", None) or {}
                path, secret = extra.get("path", path), extra.get("secret", secret)
                foreign = extra.get("foreign", foreign)
        elif origin in (Union, types.UnionType):
            some = [a for a in get_args(annotation) if a is not type(None)]
            optional = optional or len(some) < len(get_args(annotation))
            if len(some) != 1:
                return OptionKind(str, optional, path, secret, foreign)
            annotation = some[0]
        elif origin is Literal:
            return OptionKind(get_args(annotation), optional, path, secret, foreign)
        else:
            return OptionKind(origin or annotation, optional, path, secret, foreign)


@functools.cache
def own_fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Return the fields of a group that are options of ours, each with a flag and a TOML key."""
    return tuple(info for info in msgspec.structs.fields(kind) if not option_kind(info.type).foreign)


@functools.cache
def _foreign_field(kind: type[msgspec.Struct]) -> str | None:
    fields = [info.name for info in msgspec.structs.fields(kind) if option_kind(info.type).foreign]
    if len(fields) > 1:
        raise TypeError(f"{kind.__name__} has two fields of ForeignOptions: {', '.join(fields)}")
    return fields[0] if fields else None


def foreign_fields(groups: Mapping[str, type[msgspec.Struct]]) -> dict[str, str]:
    """Return the field for another program's options, by the group (and table, and prefix of the flags) it stands in.

    Raises `TypeError` for a group with two: whose is a name?
    """
    found = {table: _foreign_field(kind) for table, kind in groups.items()}
    return {table: field for table, field in found.items() if field is not None}


def options_from(args: Any, kind: type[msgspec.Struct]) -> Any:
    """Rebuild one typed group from the flat `args`: how our own hooks get back to types."""
    return kind(**{field: getattr(args, field) for field in kind.__struct_fields__})
