"""The ABI's version and its golden facts: what a release promises, one fact a line."""

from __future__ import annotations

import inspect

from miles_api.batch import TrainBatch
from miles_api.sample import Sample
from miles_api.spec import REGISTRY, Form, HookSpec

__all__ = ["ABI", "golden_facts"]

ABI = (1, 0)
"""Major and minor of the hook ABI; apart from the version of the distribution."""


def golden_facts() -> list[str]:
    """Return one sorted line for each hook form, hook method, batch column and Sample field.

    Import `miles_api.hooks` first: that fills the table.
    """
    facts = [_hook_fact(spec, form) for spec in REGISTRY.values() for form in spec.forms]
    facts += [
        f"method {spec.name}.{name}{inspect.signature(method)}"
        for spec in REGISTRY.values()
        for name, method in vars(spec.forms[0].stub).items()
        if spec.kind == "class" and inspect.isfunction(method) and not name.startswith("_")
    ]
    required = TrainBatch.__required_keys__
    facts += [f"column {name}: {'required' if name in required else 'optional'}" for name in TrainBatch.__annotations__]
    facts += [f"sample {name}: {Sample.__annotations__[name]}" for name in Sample.__struct_fields__]
    return sorted(facts)


def _hook_fact(spec: HookSpec, form: Form) -> str:
    color = "class" if isinstance(form.stub, type) else "async def" if form.is_async else "def"
    traits = [
        name
        for name, on in (("many", spec.many), ("by keyword", spec.by_keyword), ("def or async", spec.either_color))
        if on
    ]
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in form.signature.parameters.values()]
    shown = inspect.Signature(parameters)
    flag = " ".join(part for part in (spec.flag, spec.needs) if part) or "no flag"
    since = f"{spec.since[0]}.{spec.since[1]}"
    return f"hook {spec.name}/{form.name} [{flag}] since {since}: {color} {shown}" + "".join(f"; {t}" for t in traits)
