"""Do agents talk to the model and tools answer with text, each for itself?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.testing.case import case

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_MADE_UP = {"string": "text", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None}
"""A value of each JSON type, for arguments of tools."""


@case("agent", acts=True, left_out="what your model says: the session here repeats the beginning of the conversation")
def _agent(trial: Trial) -> None:
    def converse(count: int) -> None:
        prompts = trial.maker.prompts(1, count)[0]
        calls = [
            _arguments(trial, f"{trial.engine.url}/sessions/{s.index}/v1", s.prompt, dict(s.metadata)) for s in prompts
        ]
        results = trial.together(calls)
        asked = [path for path, _ in trial.engine.requests]
        for prompt, result in zip(prompts, results, strict=True):
            kind = type(result).__name__
            trial.require(
                result is None or isinstance(result, dict), f"returned a {kind}, not a dict or None", sample=prompt
            )
            own = any(path.startswith(f"/sessions/{prompt.index}/") for path in asked)
            trial.require(own, "made no request to its base_url: there is nothing to train on", sample=prompt)

    with trial.check("has a conversation"):
        converse(1)
    with trial.check("has several conversations at once, each at its own base_url"):
        converse(3)


def _arguments(trial: Trial, base_url: str, prompt: Any, metadata: dict[str, Any]) -> tuple[Any, ...]:
    kwargs = {
        "model": "model", "temperature": trial.args.rollout_temperature, "top_p": trial.args.rollout_top_p,
        "max_tokens": trial.args.rollout_max_response_len,
    }  # fmt: skip
    return base_url, prompt, kwargs, metadata


@case("agent_abort", acts=True, left_out="whether conversations end: none is under way here")
def _agent_abort(trial: Trial) -> None:
    with trial.check("can be called when nothing is under way"):
        trial.call(trial.args)
    with trial.check("can be called again"):
        trial.call(trial.args)


@case("execute_tool", acts=True, left_out="tools that --generate-tool-specs-path does not name")
def _execute_tool(trial: Trial) -> None:
    specs = _specs_of(trial)
    for spec in specs:
        function = spec["function"]
        with trial.check(f"runs the tool {function['name']}"):
            _require_text(trial, trial.call(function["name"], _made_up(function.get("parameters"))))
    with trial.check("answers a call of a tool that does not exist with text"):
        _require_text(trial, trial.call("no_such_tool", {"made": "up"}))
    with trial.check("runs several calls at once"):
        names = [spec["function"]["name"] for spec in specs] or ["no_such_tool"]
        given = [_made_up(spec["function"].get("parameters")) for spec in specs] or [{}]
        for text in trial.together(list(zip(names, given, strict=True)) * 2):
            _require_text(trial, text)


def _require_text(trial: Trial, output: Any) -> None:
    trial.require(isinstance(output, str), f"returned a {type(output).__name__}, not text for the model to read")


def _specs_of(trial: Trial) -> list[dict[str, Any]]:
    """Return the specifications that the options name; none where they name none."""
    from miles_api.hooks import REGISTRY
    from miles_api.loading.bind import resolve

    reference = trial.args.generate_tool_specs_path
    return list(resolve(REGISTRY["tool_specs"], reference).target) if reference else []


def _made_up(schema: Any) -> dict[str, Any]:
    properties = (schema or {}).get("properties") or {}
    return {name: _value(field) for name, field in properties.items()}


def _value(field: dict[str, Any]) -> Any:
    if field.get("enum"):
        return field["enum"][0]
    kind = field.get("type", "string")
    return _MADE_UP.get(kind[0] if isinstance(kind, list) else kind, "text")


@case("tool_specs")
def _tool_specs(trial: Trial) -> None:
    specs = trial.hook.target
    with trial.check("is a list of OpenAI tool specifications"):
        trial.require(isinstance(specs, list | tuple), f"is a {type(specs).__name__}, not a list")
        trial.require(specs, "is empty: leave the flag out where there is no tool")
        for number, spec in enumerate(specs):
            function = spec.get("function") if isinstance(spec, dict) and spec.get("type") == "function" else None
            named = isinstance(function, dict) and isinstance(function.get("name"), str)
            form = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
            trial.require(named, f"is {spec!r:.80}, not {form}", field=f"[{number}]")
            function = spec["function"]
            schema = function.get("parameters", {"type": "object"})
            fits = isinstance(schema, dict) and schema.get("type") == "object"
            trial.require(fits, 'its parameters are no JSON schema of {"type": "object"}', field=function["name"])
        names = [spec["function"]["name"] for spec in specs]
        trial.require(len(set(names)) == len(names), f"names a tool twice: {names}")
    with trial.check("can be written as JSON, as the chat template needs it"):
        try:
            msgspec.json.encode(specs)
        except (TypeError, ValueError) as error:
            trial.fail(f"holds something that JSON cannot hold: {error}", cause=error)
