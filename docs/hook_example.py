"""The example of each hook: what `miles hooks new` writes, without annotations and docstrings."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.cli.hooks.scaffold import hook_source

if TYPE_CHECKING:
    from miles_api.spec import HookSpec

__all__ = ["example"]

_WIDTH = 110


def example(spec: HookSpec) -> str:
    """Return the text of a small hook file that runs."""
    source = hook_source(spec, Path(f"my_{spec.name}.py"))
    lines = source.splitlines()
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: -getattr(node, "lineno", 0)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _strip_function(lines, node)
        elif isinstance(node, ast.ClassDef | ast.Module) and ast.get_docstring(node):
            _cut(lines, node.body[0])
        elif isinstance(node, ast.AnnAssign):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line[: node.target.end_col_offset] + line[node.annotation.end_col_offset or 0 :]
    return _tidy(_without_unused_imports("\n".join(lines)))


def _strip_function(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    color = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    start = f"{' ' * node.col_offset}{color} {node.name}("
    # Wrapped where it is long, further in than the body.
    head = "\n".join(textwrap.wrap(f"{start}{ast.unparse(node.args)}):", _WIDTH, subsequent_indent=" " * 8))
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        end = first.end_lineno or first.lineno
    else:
        end = next(n for n in range(node.lineno, first.lineno) if lines[n - 1].rstrip().endswith(":"))
    lines[node.lineno - 1 : end] = [head, *[""] * (end - node.lineno)]


def _cut(lines: list[str], node: ast.stmt) -> None:
    end = node.end_lineno or node.lineno
    lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)


def _without_unused_imports(source: str) -> str:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.If):  # `if TYPE_CHECKING:` holds nothing but annotations' names
            _cut(lines, node)
    tree = ast.parse("\n".join(lines))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [alias for alias in node.names if (alias.asname or alias.name).partition(".")[0] in used]
            _cut(lines, node)
            if kept:
                node.names = kept
                lines[node.lineno - 1] = ast.unparse(node)
    return "\n".join(lines)


def _tidy(source: str) -> str:
    """Return the source with one empty line between statements at most, and none after a heading."""
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", source)).strip()
    text = re.sub(r"(:\n)\n+", r"\1", text)
    return re.sub(r"(\nimport [^\n]+|\nfrom [^\n]+|^import [^\n]+|^from [^\n]+)\n\n(?=import |from )", r"\1\n", text)
