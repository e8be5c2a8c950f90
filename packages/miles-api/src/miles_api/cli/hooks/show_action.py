"""`miles hooks show NAME`: one hook in full, each thing once."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.cli.hooks.words import annotation, callers, find_spec, flag_words, heading, moment_words
from miles_api.loading.load import entry_points

if TYPE_CHECKING:
    import argparse

    from miles_api.spec import Form, HookSpec

__all__ = ["HELP", "NAME", "configure", "run"]

NAME = "show"
HELP = "one hook: signature, when it is called, what it takes and returns, who offers one"
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", help="the hook's name, as `miles hooks list` has it")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(options: argparse.Namespace) -> int:
    """Print the page."""
    page = _page(find_spec(options.name))
    print(msgspec.json.encode(page).decode() if options.json else _text(page))
    return 0


def _page(spec: HookSpec) -> dict[str, Any]:
    caller = callers().get(spec.name)
    deprecated = {"": spec.deprecated} if spec.deprecated else {}
    return {
        "hook": spec.name, "flag": spec.flag, "needs": spec.needs, "flag_words": flag_words(spec), "stage": spec.stage,
        "kind": spec.kind, "doc": spec.doc, "runs": moment_words(spec),
        "forms": [_form(form, spec) for form in spec.forms],
        "side": spec.side, "moment": spec.moment, "many": spec.many, "by_keyword": spec.by_keyword,
        "def_or_async": spec.either_color, "since": ".".join(map(str, spec.since)), "default": spec.default,
        "called_by": caller, "missing": None if caller else f"miles-{spec.side}",
        "deprecated": {name: str(what) for name, what in {**deprecated, **spec.deprecated_arguments}.items()},
        "short_names": [
            {"name": name, "value": point.value, "distribution": point.dist.name if point.dist else None,
             "version": point.dist.version if point.dist else None}
            for name, points in sorted(entry_points(spec.group).items()) for point in points
        ],
    }  # fmt: skip


def _form(form: Form, spec: HookSpec) -> dict[str, Any]:
    by_name = form.named(spec.by_keyword)
    result = form.signature.return_annotation
    is_class = isinstance(form.stub, type)
    return {
        "name": form.name,
        "signature": heading(form, form.stub.__name__ if is_class else spec.name),
        "doc": inspect.cleandoc(form.stub.__doc__ or ""),
        "parameters": [] if is_class else [
            {"name": p.name, "type": annotation(p.annotation), "by_name": p.name in by_name}
            for p in form.signature.parameters.values() if p.kind not in _VARIADIC
        ],
        "returns": None if is_class or result is inspect.Signature.empty else annotation(result),
    }  # fmt: skip


def _text(page: dict[str, Any]) -> str:
    first, *others = page["forms"]
    lines = [f"{page['hook']}  {page['flag_words']}", "", _indented(first["signature"]), "", page["doc"]]
    for form in others:
        lines += ["", "or:", "", _indented(form["signature"]), "", form["doc"]]
    rows = [("takes", text) for text in _takes(first, page)] + [("returns", first["returns"])]
    if page["kind"] == "value":
        rows = [("is", f"a value: {first['returns']}")]
    rows += [
        ("written as", _written(page)), ("runs", page["runs"]), ("since", f"ABI {page['since']}"),
        ("default", page["default"]),
        *(("deprecated", " ".join(filter(None, (name, what)))) for name, what in page["deprecated"].items()),
        ("called by", page["called_by"] or f"nothing installed: needs {page['missing']} to run"),
        ("short names", ", ".join(f"{one['name']} ({one['distribution']})" for one in page["short_names"]) or "none"),
        ("begin one", f"miles hooks new {page['hook']}"),
    ]  # fmt: skip
    shown = [(title, text) for title, text in rows if text]
    titles = ["" if i and shown[i - 1][0] == title else title for i, (title, _) in enumerate(shown)]
    lines += ["", *(f"{title:12} {text}" for title, (_, text) in zip(titles, shown, strict=True))]
    return "\n".join(lines)


def _takes(form: dict[str, Any], page: dict[str, Any]) -> list[str]:
    width = max((len(p["name"]) for p in form["parameters"]), default=0)
    note = "  (by name)" if page["by_keyword"] else "  (by name, may be left out)"
    return [f"{p['name']:{width}}  {p['type']}{note if p['by_name'] else ''}" for p in form["parameters"]]


def _written(page: dict[str, Any]) -> str:
    if page["kind"] != "function":
        return "a class" if page["kind"] == "class" else ""
    color = "async def" if page["forms"][0]["signature"].startswith("async") else "def"
    either = "def (in a thread of its own) or async def" if page["def_or_async"] else f"{color} only"
    return f"{either}, or a class with that __call__" + (", several in a row" if page["many"] else "")


def _indented(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")
