"""What the stubs say, in the words and signatures that `miles hooks` prints."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError, did_you_mean
from miles_api.hooks import REGISTRY
from miles_api.loading.load import entry_points, provider

if TYPE_CHECKING:
    from miles_api.spec import Form, HookSpec

__all__ = ["STAGES", "annotation", "callers", "find_spec", "flag_words", "heading", "moment_words", "parameters"]

STAGES = ("rollout", "reward", "filtering", "conversion", "training", "megatron", "logging", "routing", "model",
          "agents")  # fmt: skip
"""In the order in which a run meets them."""

_SIDES = {"rollout": "in the rollout process", "train": "on every trainer rank", "router": "in the router process"}
_ON_RANK_0 = ("post_save",)
_MOMENTS = {
    "start": "once, when the run starts", "rollout": "in every rollout", "eval": "with each evaluation",
    "save": "with each checkpoint", "sometimes": "when there is reason to",
}  # fmt: skip
_WIDTH = 100
_P = inspect.Parameter


def find_spec(name: str) -> HookSpec:
    """Return one hook; `ConfigError` with the nearest name where there is none."""
    if name not in REGISTRY:
        raise ConfigError(f"there is no hook {name!r}{did_you_mean(name, REGISTRY)}; `miles hooks list` names all")
    return REGISTRY[name]


def flag_words(spec: HookSpec) -> str:
    """Return the flag, with the switch that gives it this meaning."""
    return " ".join(part for part in (spec.flag, spec.needs) if part) or "(a function `abort` beside the agent)"


def moment_words(spec: HookSpec) -> str:
    """Say where and when a hook runs."""
    side = "on trainer rank 0" if spec.name in _ON_RANK_0 else _SIDES[spec.side]
    return f"{side}, {_MOMENTS[spec.moment]}"


def callers() -> dict[str, str]:
    """Return, for each hook that an installed package can call, the distribution that does."""
    found: dict[str, str] = {}
    for name, points in sorted(entry_points("miles.checks").items()):
        owner = points[0].dist.name if points[0].dist else name
        found |= dict.fromkeys(sorted(provider("miles.checks", name).HOOKS), owner)
    return found


def annotation(value: Any) -> str:
    """Return an annotation as it is written."""
    return value if isinstance(value, str) else inspect.formatannotation(value)


def parameters(signature: inspect.Signature, *, marks: bool = True) -> list[str]:
    """Return the parts between the parentheses, without `self`; `marks` adds the `/` after positional ones."""
    parts: list[str] = []
    given = [p for p in signature.parameters.values() if p.name != "self"]
    for i, parameter in enumerate(given):
        before = given[i - 1].kind if i else None
        if marks and before is _P.POSITIONAL_ONLY and parameter.kind is not _P.POSITIONAL_ONLY:
            parts.append("/")
        if parameter.kind is _P.KEYWORD_ONLY and before not in (_P.KEYWORD_ONLY, _P.VAR_POSITIONAL):
            parts.append("*")
        parts.append(_parameter(parameter))
    if marks and given and given[-1].kind is _P.POSITIONAL_ONLY:
        parts.append("/")
    return parts


def _parameter(parameter: inspect.Parameter) -> str:
    stars = "*" if parameter.kind is _P.VAR_POSITIONAL else "**" if parameter.kind is _P.VAR_KEYWORD else ""
    text = stars + parameter.name
    if parameter.annotation is not _P.empty:
        text += f": {annotation(parameter.annotation)}"
    if parameter.default is not _P.empty:
        text += f" = {parameter.default!r}"
    return text


def heading(form: Form, name: str, *, marks: bool = True) -> str:
    """Return `async def name(…) -> …` or, for a class, its methods; wrapped where it is long."""
    if isinstance(form.stub, type):
        lines = [_definition(method, marks=marks) for method in _methods(form.stub)]
        return "\n".join([f"class {name}:", *("    " + line.replace("\n", "\n    ") for line in lines)])
    return _definition(form.stub, name, marks=marks)


def _definition(function: Any, name: str | None = None, *, marks: bool = True) -> str:
    signature = inspect.signature(function)
    color = "async def" if inspect.iscoroutinefunction(function) else "def"
    parts = [p for p in ["self"] if p in signature.parameters] + parameters(signature, marks=marks)
    start = f"{color} {name or function.__name__}("
    end = (
        ")"
        if signature.return_annotation is inspect.Signature.empty
        else f") -> {annotation(signature.return_annotation)}"
    )
    line = start + ", ".join(parts) + end
    return line if len(line) <= _WIDTH else f"{start}\n    " + ",\n    ".join(parts) + f",\n{end}"


def _methods(stub: type) -> list[Any]:
    """Return a class stub's own methods, the constructor first, inherited ones included."""
    found: dict[str, Any] = {}
    for base in reversed([base for base in stub.__mro__ if base.__module__.startswith("miles_api.")]):
        found |= {name: value for name, value in vars(base).items() if inspect.isfunction(value)}
    return [value for name, value in found.items() if name in ("__init__", "__call__") or not name.startswith("_")]
