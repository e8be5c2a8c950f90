"""The golden facts of the ABI: what a release promises, one fact a line."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from miles_api.abi import shown
from miles_api.batch import TrainBatch
from miles_api.hooks import REGISTRY
from miles_api.rollout_types import (
    DynamicFilterOutput,
    GenerateFnInput,
    GenerateFnOutput,
    GenerateState,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles_api.sample import PrefixCacheInfo, Sample, SpecInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miles_api.spec import Form, HookSpec

__all__ = ["golden_facts"]

_TYPES = (
    DynamicFilterOutput, GenerateFnInput, GenerateFnOutput, PrefixCacheInfo, RolloutFnConstructorInput,
    RolloutFnEvalInput, RolloutFnEvalOutput, RolloutFnTrainInput, RolloutFnTrainOutput, SpecInfo,
)  # fmt: skip


def golden_facts(registry: Mapping[str, HookSpec] = REGISTRY) -> list[str]:
    """Return one sorted line for each hook form, hook method, batch column and field of a type that hooks see."""
    facts = [_hook_fact(spec, form) for spec in registry.values() for form in spec.forms]
    facts += [
        f"method {spec.name}.{name}{inspect.signature(method)}"
        for spec in registry.values()
        for name, method in vars(spec.forms[0].stub).items()
        if spec.kind == "class" and inspect.isfunction(method) and not name.startswith("_")
    ]
    required = TrainBatch.__required_keys__
    facts += [f"column {name}: {'required' if name in required else 'optional'}" for name in TrainBatch.__annotations__]
    facts += [f"sample {name}: {Sample.__annotations__[name]}" for name in Sample.__struct_fields__]
    facts += [
        f"{kind.__name__} {name}: {kind.__annotations__[name]}" for kind in _TYPES for name in kind.__struct_fields__
    ]
    facts += [f"GenerateState {name}" for name in GenerateState.__annotations__]
    return sorted(facts)


def _hook_fact(spec: HookSpec, form: Form) -> str:
    color = "class" if isinstance(form.stub, type) else "async def" if form.is_async else "def"
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in form.signature.parameters.values()]
    flag = " ".join(part for part in (spec.flag, spec.needs) if part) or "no flag"
    traits = "".join(f"; {trait}" for trait in _traits(spec))
    return (
        f"hook {spec.name}/{form.name} [{flag}] since {shown(spec.since)}: "
        f"{color} {inspect.Signature(parameters)}{traits}"
    )


def _traits(spec: HookSpec) -> list[str]:
    switches = (("many", spec.many), ("by keyword", spec.by_keyword), ("def or async", spec.either_color))
    return [
        *(name for name, on in switches if on),
        f"moment {spec.moment}",
        *([f"same instance as {spec.shares}"] if spec.shares else []),
        *(f"{name} since {shown(since)}" for name, since in spec.added.items()),
        *([f"deprecated {spec.deprecated}"] if spec.deprecated else []),
        *(f"{name} deprecated {what}" for name, what in spec.deprecated_arguments.items()),
    ]
