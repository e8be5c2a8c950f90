"""What can be known to be wrong with SGLang engines before anything starts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from miles_api.config import DERIVED
from miles_api.errors import MilesError
from miles_api.options import flag_of
from miles_api.parsing.given import COMMAND_LINE
from miles_api.run_options import RunOptions
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.sglang.arguments import ask_arguments, find_sglang
from miles_rollout.engines.sglang.options import SGLangOptions, interpreter
from miles_rollout.options import EngineFleetOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["context_length", "derived_engines", "engine_notes", "engine_problems", "urls_of"]

_ONLY_LOCAL = {
    "engine_max_running_requests": "--sglang-max-running-requests",
    "engine_max_total_len": "--sglang-context-length",
    "engine_impl": "",
}
"""Options of the local engine, and what SGLang has in their place."""
_LAUNCH = ("engine_host", "engine_start_timeout", "rollout_engine_base_port")


def urls_of(config: RunConfig) -> list[str]:
    """Return the addresses that `--rollout-engine-urls` names, without trailing slashes."""
    given = config.group(EngineFleetOptions).rollout_engine_urls or []
    return [url.strip().rstrip("/") for text in given for url in text.split(",") if url.strip()]


def derived_engines(config: RunConfig) -> dict[str, int]:
    """Return the number of engines, where their addresses are named."""
    urls = urls_of(config)
    return {"rollout_num_engines": len(urls)} if urls and "rollout_num_engines" not in _set_by_hand(config) else {}


def context_length(config: RunConfig) -> int | None:
    """Return the longest prompt plus response that the run's options allow an engine; None where they say nothing."""
    if config.group(EngineFleetOptions).rollout_engine == "local":
        return config.group(LocalEngineOptions).engine_max_total_len
    length = config.group(SGLangOptions).sglang_args.get("context_length")
    return length if isinstance(length, int) else None


def engine_notes(config: RunConfig) -> list[str]:
    """Return which options of engines this run does not use."""
    given, fleet = _set_by_hand(config), config.group(EngineFleetOptions)
    theirs = sorted(_flag(name) for name in config.group(SGLangOptions).sglang_args)
    theirs += ["--sglang-python"] if "sglang_python" in given else []
    if fleet.rollout_engine == "local":
        return [f"rollout_engine local: not used, nor checked: {', '.join(theirs)}"] if theirs else []
    unused = [_instead(name, other) for name, other in _ONLY_LOCAL.items() if name in given]
    unused += [flag_of(name) for name in _LAUNCH if name in given and urls_of(config)]
    return [f"rollout_engine sglang: not used: {', '.join(unused)}"] if unused else []


def engine_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with engines that are SGLang's, launched or attached."""
    fleet, urls = config.group(EngineFleetOptions), urls_of(config)
    if fleet.rollout_engine == "local":
        if urls:
            yield "--rollout-engine-urls attaches to SGLang servers: it needs --rollout-engine sglang"
        return
    if config.group(RunOptions).deterministic:
        yield (
            "--deterministic needs --rollout-engine local: what SGLang answers depends on what else is in the batch, "
            "and its --enable-deterministic-inference promises nothing across a restart"
        )
    yield from _attached(config, urls) if urls else _launched(config)


def _launched(config: RunConfig) -> Iterator[str]:
    options = config.group(SGLangOptions)
    every = [name for group in config.groups.values() for name in group.__struct_fields__]
    ours = [name.removeprefix("sglang_") for name in every if name.startswith("sglang_") and name != "sglang_args"]
    try:
        verdict = ask_arguments(find_sglang(interpreter(options)), options.sglang_args, ours)
    except MilesError as error:
        yield (
            f"--rollout-engine sglang: {error}\n  Name a Python that has it with --sglang-python: an environment of "
            "its own, as its pins clash with the trainer's (docs/sglang.md), or take --rollout-engine local."
        )
        return
    yield from (f"{_where(config, name)}: {text}" for name, text in verdict.problems.items())


def _attached(config: RunConfig, urls: list[str]) -> Iterator[str]:
    fleet = config.group(EngineFleetOptions)
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not re.fullmatch(r".*:\d+", parts.netloc) or parts.path:
            yield f"--rollout-engine-urls: {url!r} is not of the form http://host:port"
    if len(set(urls)) < len(urls):
        yield f"--rollout-engine-urls names an engine twice: {', '.join(urls)}"
    if fleet.rollout_num_engines != len(urls):
        yield f"--rollout-num-engines {fleet.rollout_num_engines}, but --rollout-engine-urls names {len(urls)}: drop it"
    if config.flat().get("colocate"):
        yield "--rollout-engine-urls with --colocate: the servers have GPUs of their own already; drop one"
    for name in config.group(SGLangOptions).sglang_args:
        yield f"{_where(config, name)}: the servers of --rollout-engine-urls run already, with arguments of their own"


def _set_by_hand(config: RunConfig) -> set[str]:
    return {name for name, source in config.sources.items() if source != DERIVED}


def _where(config: RunConfig, name: str) -> str:
    """Say where an argument was written, and what."""
    value, source = config.group(SGLangOptions).sglang_args[name], config.sources.get(f"sglang_{name}", COMMAND_LINE)
    shown = "" if value is True else f" {value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
    return f"{_flag(name)}{shown}" if source == COMMAND_LINE else f"{source} [sglang] {name} ({_flag(name)}{shown})"


def _flag(name: str) -> str:
    return flag_of(f"sglang_{name}")


def _instead(name: str, other: str) -> str:
    return flag_of(name) + (f" (SGLang's is {other})" if other else "")
