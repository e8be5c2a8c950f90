"""Write `docs/hooks.md` from the stubs: `python docs/generate.py`. Needs miles-api alone.

What the stubs do not say stands in `hook_facts.py`; `hook_example.py` makes the examples, which a test runs.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hook_example import example
from hook_facts import BY_LOOP, FAILURES, FIRES, MOMENTS, NEEDS, PROCESS, RANKS

import miles_api.rollout_types as types
from miles_api.abi import shown
from miles_api.batch import TrainBatch
from miles_api.cli.hooks.words import STAGES, flag_words, heading, parameters
from miles_api.hooks import REGISTRY
from miles_api.run_options import RunOptions
from miles_api.sample import Sample, Status
from miles_api.testing.options import ReliedOn

if TYPE_CHECKING:
    from miles_api.spec import HookSpec

__all__ = ["HOOKS_PAGE", "hooks_page"]

HOOKS_PAGE = Path(__file__).with_name("hooks.md")

_FIELD_WORDS = {
    "multimodal_inputs": "Images and the like. This version does not train them: they are refused at conversion.",
    "multimodal_train_inputs": "As `multimodal_inputs`.",
    "status": f"`Sample.Status`: {', '.join(status.value for status in Status)}.",
    "session_id": "Names a conversation to the engine.",
    "spec_info": "Counts of speculative decoding, from the engine's `meta_info`.",
    "prefix_cache_info": "Counts of cached prompt tokens, from the engine's `meta_info`.",
}
"""Of fields that have no docstring of their own."""

_INTRO = """\
# Hooks

Generated from the stubs in `packages/miles-api/src/miles_api/hooks/` by `python docs/generate.py`; do not edit.

How to write, check, test and ship one: [writing-a-hook.md](writing-a-hook.md). What may change in which version:
[abi.md](abi.md). `miles hooks show NAME` prints one of the sections below, `miles hooks new NAME` writes its example
with a test, `miles hooks check REF --as NAME` checks yours.

A hook is named by its flag: `--custom-rm-path path/file.py:fn`, `pkg.mod:fn`, `pkg.mod.fn`, or a short name that an
installed distribution offers. Where *several* says yes the flag takes a comma-separated list, a TOML file a list of
strings; they are called in this order. *async or def* means that both are taken; a `def` then runs in a thread. A class
may stand for every function: it is built once, from `args` or from nothing, and its instance is called.
"""

_ARGS_INTRO = """\
Read options by name: `args.reward_key`. What a hook writes to `args` stays its own (see
[writing-a-hook.md](writing-a-hook.md#args)). Every hook may rely on the names below, on one `*_path` name for each flag
above, and on its own options. A run has more: `miles train --help` shows those of all installed packages.
"""


def hooks_page() -> str:
    """Return the text of `docs/hooks.md`."""
    specs = sorted(REGISTRY.values(), key=lambda spec: STAGES.index(spec.stage))
    parts = [_INTRO, _overview(specs), *map(_section, specs), _failures(), _types()]
    return "\n".join(parts).rstrip() + "\n"


def _overview(specs: list[HookSpec]) -> str:
    rows, stage = [], ""
    for spec in specs:
        first, stage = ("" if spec.stage == stage else spec.stage.capitalize()), spec.stage
        several = "yes" if spec.many else ""
        name = f"[`{spec.name}`](#{spec.name})"
        rows.append([first, name, _flag(spec), _fires(spec), _color(spec), several, _default_words(spec)])
    return _table(["stage", "hook", "flag", "fires", "written as", "several", "without it"], rows) + "\n"


def _default_words(spec: HookSpec) -> str:
    return re.sub(r"--[a-z-]+", r"`\g<0>`", spec.default)


def _flag(spec: HookSpec) -> str:
    return f"`{flag_words(spec)}`" if spec.flag else "none"


def _fires(spec: HookSpec) -> str:
    """Return the first sentence of the docstring's second paragraph, which says when the hook is called."""
    when = " ".join(spec.doc.split("\n\n")[1].split())
    sentence = FIRES.get(spec.name) or re.split(r"[.;](?: |$)", when)[0].removeprefix("Called ")
    return re.sub(r" \([^)]{30,}\)", "", sentence[0].lower() + sentence[1:])


def _color(spec: HookSpec) -> str:
    if spec.kind != "function":
        return spec.kind
    if spec.either_color:
        return "async or def"
    return "async def" if spec.forms[0].is_async else "def"


def _section(spec: HookSpec) -> str:
    lines = [f"## {spec.name}", "", _flag(spec) if spec.flag else "Found without a flag.", ""]
    for number, form in enumerate(spec.forms):
        if number:
            lines += [_prose(f"Or: {inspect.cleandoc(form.stub.__doc__ or '')}"), ""]
        name = form.stub.__name__ if isinstance(form.stub, type) else spec.name
        lines += ["```python", heading(form, name), "```", ""]
        if not number:
            lines += [_prose(spec.doc), ""]
    lines += [_table(["", ""], [[f"**{title}**", text] for title, text in _facts(spec)]), ""]
    lines += ["```python", example(spec), "```", ""]
    return "\n".join(lines)


def _facts(spec: HookSpec) -> list[tuple[str, str]]:
    deadline, repeated, at_last = next(row[1:] for row in FAILURES if spec.name in row[0])
    ends = f"deadline: {deadline}. Repeated: {repeated}. At last: {at_last}."
    facts = [
        *_in_and_out(spec),
        ("runs in", RANKS.get(spec.name, PROCESS[spec.side])),
        ("called by", "the default rollout; a `rollout` hook of your own calls it or not" * (spec.name in BY_LOOP)),
        ("must be called", _must(spec)),
        ("written as", _color(spec) + (", several in a row" if spec.many else "")),
        ("needs", NEEDS.get(spec.name, "")),
        (
            "shares",
            f"its instance and `args` with `{spec.shares}`, if both name the same reference" * bool(spec.shares),
        ),
        *_versions(spec),
        ("without it", _default_words(spec)),
        ("[when it fails](#when-a-hook-fails)", ends.replace("HOOK", spec.name)),
    ]
    return [(title, text) for title, text in facts if text]


def _in_and_out(spec: HookSpec) -> list[tuple[str, str]]:
    result = spec.forms[0].signature.return_annotation
    if spec.kind == "value":
        return [("is", f"a value: `{result}`")]
    if spec.kind == "class":
        return []
    left_out = sorted(spec.forms[0].named(spec.by_keyword))
    passed = "all by name" if spec.by_keyword else ", ".join(f"`{name}`" for name in left_out)
    return [
        ("returns", f"`{result}`"),
        ("may leave out", f"{passed}: what it does not take is not passed" if left_out else ""),
    ]


def _versions(spec: HookSpec) -> list[tuple[str, str]]:
    return [
        ("since", f"ABI {shown(spec.since)}"),
        *((f"`{name}` since", f"ABI {shown(since)}") for name, since in spec.added.items()),
        *([("deprecated", str(spec.deprecated))] if spec.deprecated else []),
        *((f"`{name}` deprecated", str(what)) for name, what in spec.deprecated_arguments.items()),
    ]


def _must(spec: HookSpec) -> str:
    if spec.moment not in MOMENTS:
        return "no: only when there is reason"
    if spec.kind != "function":
        return "must be loaded before the first rollout, else the run stops"
    return f"{MOMENTS[spec.moment]}, else the run stops"


def _failures() -> str:
    rows = [
        [", ".join(f"`{name}`" for name in names), deadline, repeated, at_last]
        for names, deadline, repeated, at_last in FAILURES
    ]
    return "\n".join(
        [
            "## When a hook fails",
            "",
            _prose(
                "A hook fails when it raises, runs past its deadline or returns what its signature does not allow. "
                "What it raised is shown with its own traceback and notes that name hook, sample and place. More in "
                "[writing-a-hook.md](writing-a-hook.md#when-it-fails)."
            ),
            "",
            _table(["hooks", "deadline", "repeated", "at last"], rows),
            "",
        ]
    )


def _types() -> str:
    output = (types.DynamicFilterOutput, types.GenerateFnOutput, types.RolloutFnTrainOutput, types.RolloutFnEvalOutput)
    given = (
        types.GenerateFnInput, types.RolloutFnConstructorInput, types.RolloutFnTrainInput, types.RolloutFnEvalInput,
    )  # fmt: skip
    lines = ["## Types", "", "All of them are in `miles_api`, none needs a tensor library.", ""]
    lines += ["### Sample", "", _doc(Sample), "", _field_table(Sample), "", "Methods:", "", _methods(Sample), ""]
    lines += [
        "### Group", "", _prose("`list[Sample | list[Sample]]`: the samples of one prompt. A generation that fanned "
        "out is a list in the place of its sample."), "",
    ]  # fmt: skip
    lines += ["### GenerateState", "", _doc(types.GenerateState), "", _field_table(types.GenerateState), ""]
    lines += [_methods(types.GenerateState), ""]
    for kind in (*given, *output):
        lines += [f"### {kind.__name__}", "", _doc(kind), "", _field_table(kind), ""]
    lines += ["### TrainBatch", "", _doc(TrainBatch), "", _field_table(TrainBatch), ""]
    lines += [
        _prose("On a trainer rank the same columns are called `rollout_data` (this rank's share of a rollout) or "
        "`batch` (one micro-batch): each sample's `tokens` are an int64 tensor, its masks and log-probs fp32 tensors "
        "of response length. `log_probs`, `advantages` and `returns` are added as they are computed."), "",
    ]  # fmt: skip
    return "\n".join([*lines, "### args", "", _ARGS_INTRO, _args_table(), ""])


def _args_table() -> str:
    rows = [[f"`{name}`", f"`{_plain_type(kind)}`", _code(default), doc]
            for name, kind, default, doc in _fields(RunOptions)]  # fmt: skip
    others = ", ".join(f"`{name}: {kind}`" for name, kind, _, _ in _fields(ReliedOn))
    return f"{_table(['name', 'type', 'default', ''], rows)}\n\n" + _prose(f"And of the other packages: {others}.")


def _plain_type(annotation: str) -> str:
    """Return an annotation without its bounds: `int` for `_Positive`, `str` for a path."""
    short = annotation.replace("_Positive", "int").replace("UserPath", "str").replace("OutputPath", "str")
    return re.sub(r"Annotated\[(\w+), .*\]", r"\1", short)


def _field_table(kind: type) -> str:
    fields = _fields(kind)
    rows = [[f"`{name}`", f"`{annotation}`", *([_code(default)] if default else [""]), doc]
            for name, annotation, default, doc in fields]  # fmt: skip
    return _table(["field", "type", "default", ""], rows)


def _fields(kind: type) -> list[tuple[str, str, str, str]]:
    """Return name, annotation, default and docstring of each field, as the class's source has them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        doc = " ".join(str(said).split()) or _FIELD_WORDS.get(node.target.id, "")
        found.append((node.target.id, ast.unparse(node.annotation), _default(node.value), doc))
    return found


def _default(value: ast.expr | None) -> str:
    """Return a default as it is written; the empty value for a factory."""
    if value is None:
        return ""
    text = ast.unparse(value)
    factory = re.fullmatch(r"msgspec\.field\(default_factory=(\w+)\)", text)
    return {"list": "[]", "dict": "{}"}.get(factory[1], f"{factory[1]}()") if factory else text


def _methods(kind: type) -> str:
    rows = []
    for name, value in vars(kind).items():
        public = not name.startswith("_") and getattr(value, "__doc__", None)
        if public and isinstance(value, property) and value.fget and value.fget.__name__ == name:
            rows.append([f"`{name}`", _first(value)])
        elif public and (inspect.isfunction(value) or isinstance(value, classmethod)):
            function = getattr(value, "__func__", value)
            names = [part for part in parameters(inspect.signature(function)) if part not in ("cls", "/")]
            rows.append([f"`{name}({', '.join(re.split('[:=]', part)[0].strip() for part in names)})`", _first(value)])
    return _table(["", ""], rows)


def _first(value: Any) -> str:
    return inspect.cleandoc(value.__doc__).splitlines()[0]


def _doc(kind: type) -> str:
    return _prose(inspect.cleandoc(kind.__doc__ or ""))


def _prose(text: str) -> str:
    """Return paragraphs in lines of this page: how a stub wraps its lines is its own business."""
    fill = textwrap.TextWrapper(120, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(fill(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    HOOKS_PAGE.write_text(hooks_page(), encoding="utf-8")
    sys.stdout.write(f"wrote {HOOKS_PAGE}\n")
