"""What several engines say of themselves, in the form in which one says it.

With one healthy engine that has no key its answer passes through as it is; nothing here is called. SGLang names its own
key in `/server_info`: what an engine says is passed on without it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import UpstreamError
from .fetch import fetch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from .workers import Worker

    Aggregate = Callable[[Sequence[Worker], str], Awaitable[tuple[int, object]]]

__all__ = ["AGGREGATED"]

_DEADLINE_S = 10.0
_OK = 200


async def _models(workers: Sequence[Worker], path: str) -> tuple[int, object]:
    """Every model that any engine serves, once."""
    answers, problems = await _ask(workers, path)
    models: dict[str, Any] = {}
    for _, answer in answers:
        for model in _listed(answer.get("data")):
            models.setdefault(str(model.get("id")), model)
    return (200, {"object": "list", "data": list(models.values())}) if answers else _nobody(path, problems)


def _listed(data: object) -> list[dict[str, Any]]:
    return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []


async def _servers(workers: Sequence[Worker], path: str) -> tuple[int, object]:
    """What the first engine says and, of several, under `workers` what each says, with its URL."""
    answers, problems = await _ask(workers, path)
    if answers and len(workers) == 1:
        return 200, answers[0][1]
    rows = [{**answer, "url": worker.url} for worker, answer in answers]
    return (200, {**answers[0][1], "workers": rows}) if answers else _nobody(path, problems)


async def _ask(workers: Sequence[Worker], path: str) -> tuple[list[tuple[Worker, dict[str, Any]]], list[str]]:
    """Return the answers of those that answer, and what is wrong with the others."""
    said = await asyncio.gather(*(_ask_one(worker, path) for worker in workers))
    answers = [(worker, value) for worker, value in zip(workers, said, strict=True) if isinstance(value, dict)]
    problems = [f"{w.url} {value}" for w, value in zip(workers, said, strict=True) if isinstance(value, str)]
    return answers, problems


async def _ask_one(worker: Worker, path: str) -> dict[str, Any] | str:
    try:
        async with asyncio.timeout(_DEADLINE_S):
            status, body = await fetch(worker, path)
        if status != _OK:
            return f"answers {path} with {status}"
        said = msgspec.json.decode(body, type=dict[str, Any])
        return _without(worker.key.decode(), said) if worker.key else said
    except TimeoutError:
        return f"does not answer {path} within {_DEADLINE_S:g} s"
    except UpstreamError as error:
        return str(error)
    except msgspec.DecodeError as error:
        return f"answers {path} with something unreadable: {error}"


def _without(key: str, said: Any) -> Any:
    """Return what an engine says without its key, however that was escaped."""
    if isinstance(said, str):
        return said.replace(key, "")
    if isinstance(said, list):
        return [_without(key, each) for each in said]
    if isinstance(said, dict):
        return {name: _without(key, each) for name, each in said.items()}
    return said


def _nobody(path: str, problems: list[str]) -> tuple[int, object]:
    message = f"no worker answers {path}: {'; '.join(problems)}"
    return 503, {"error": {"message": message, "type": "no_worker", "code": 503}}


AGGREGATED: dict[str, Aggregate] = {"/v1/models": _models, "/server_info": _servers, "/get_server_info": _servers}
"""The paths whose answers are put together, and how."""
