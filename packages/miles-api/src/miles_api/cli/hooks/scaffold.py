"""From a stub to a first file of the author's own: the stub's name, colour and parameters, and a body that runs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING

import miles_api
from miles_api.cli.hooks.bodies import BODIES
from miles_api.cli.hooks.words import heading

if TYPE_CHECKING:
    from pathlib import Path

    from miles_api.spec import Form, HookSpec

__all__ = ["function_name", "hook_source", "test_source"]

_FORMS = {"generate": "input"}
"""The form to begin with, where it is not the first: this one reaches the engines without an HTTP client."""
_NAMES = {"agent_abort": "abort", "data_source": "DataSource", "router_middleware": "RouterMiddleware"}
_STANDARD = {
    "Any": "from typing import Any", "Callable": "from collections.abc import Callable",
    "Awaitable": "from collections.abc import Awaitable", "Path": "from pathlib import Path",
    "asyncio": "import asyncio", "json": "import json", "time": "import time", "urllib": "import urllib.request",
    "defaultdict": "from collections import defaultdict",
}  # fmt: skip


def function_name(spec: HookSpec) -> str:
    """Return what the hook is called in its file."""
    return _NAMES.get(spec.name, spec.name)


def hook_source(spec: HookSpec, file: Path) -> str:
    """Return the text of a hook file."""
    name = function_name(spec)
    form = next(form for form in spec.forms if form.name == _FORMS.get(spec.name, "plain"))
    body = BODIES[spec.name]
    if spec.kind == "value":
        code = f"{body.strip()}\n"
    elif spec.kind == "class":
        code = f"class {name}:\n{_docstring(form)}\n\n{textwrap.indent(body.strip(), '    ')}\n"
    else:
        code = _function(form, name, body.strip())
    return f'"""A {spec.name} hook for Miles."""\n\nfrom __future__ import annotations\n\n{_imports(code)}{code}'


def _function(form: Form, name: str, body: str) -> str:
    """Return a function and, after two empty lines of the body, what stands beside it in the module."""
    inside, *beside = body.split("\n\n\n")
    apart = "\n" if inside.startswith("def ") else ""
    # Without `/`, which few read: Miles passes these by position either way.
    start = f"{heading(form, name, marks=False)}:\n{_docstring(form)}\n{apart}{textwrap.indent(inside, '    ')}\n"
    return "\n\n".join([start, *(f"{text}\n" for text in beside)])


def test_source(spec: HookSpec, file: Path) -> str:
    """Return the text of its test."""
    name = function_name(spec)
    first = f'"""Does {file.name} do what Miles needs of it?"""'
    here = f"HOOK = f\"{{Path(__file__).with_name('{file.name}')}}:{name}\""
    if spec.name == "model_provider":
        return _MODEL_TEST.format(first=first, here=here)
    return (
        f"{first}\n\nfrom pathlib import Path\n\n{here}\n\n\n"
        f'def test_the_{spec.name}_hook_does_what_its_stub_says(check_hook):\n    check_hook("{spec.name}", HOOK)\n'
    )


_MODEL_TEST = """\
{first}

from pathlib import Path

from miles_api.loading.bind import resolve
from miles_api.hooks import REGISTRY

{here}


def test_the_model_provider_fits_its_stub():
    # A Megatron model needs a trainer rank's process groups: only there can the provider be called.
    resolve(REGISTRY["model_provider"], HOOK)
"""


def _docstring(form: Form) -> str:
    text = inspect.cleandoc(form.stub.__doc__ or "")
    return textwrap.indent(f'"""{text}\n"""' if "\n" in text else f'"""{text}"""', "    ")


def _imports(code: str) -> str:
    """Return the imports that the code needs: the standard library's, torch, ours."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    standard = sorted(line for name, line in _STANDARD.items() if name in used)
    if "Tensor" in used and "torch" not in used:
        # Only an annotation: the file loads where there is no torch.
        standard.append("from typing import TYPE_CHECKING")
    blocks = ["\n".join(sorted(standard, key=lambda line: (line.startswith("from"), line)))]
    if "torch" in used:
        blocks.append("\n".join(["import torch", *(["from torch import Tensor"] if "Tensor" in used else [])]))
    ours = sorted(name for name in used if name in miles_api.__all__)
    if ours:
        blocks.append(f"from miles_api import {', '.join(ours)}")
    if "Tensor" in used and "torch" not in used:
        blocks.append("if TYPE_CHECKING:\n    from torch import Tensor")
    text = "\n\n".join(filter(None, blocks))
    return f"{text}\n\n\n" if text else "\n"
