"""Arguments for SGLang's server, as the installed SGLang itself understands them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ServiceError, did_you_mean
from miles_api.options import flag_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["OWNED", "Installed", "Verdict", "ask_arguments", "cpu_environment", "find_sglang"]

OWNED = {
    "model_path": "--hf-checkpoint sets it",
    "tokenizer_path": "--hf-checkpoint sets it",
    "host": "--engine-host sets it",
    "port": "--rollout-engine-base-port sets it",
    "tp_size": "--rollout-num-gpus-per-engine sets it",
    "nnodes": "the placement of the engines sets it (--rollout-num-gpus-per-engine)",
    "node_rank": "the placement of the engines sets it (--rollout-num-gpus-per-engine)",
    "dist_init_addr": "the placement of the engines sets it (--rollout-num-gpus-per-engine)",
    "base_gpu_id": "the placement of the engines sets it, through CUDA_VISIBLE_DEVICES",
    "device": "an engine that is given GPUs runs on them, any other on the CPU",
    "random_seed": "--seed sets it, another one for each engine",
    "weight_version": "the weight synchronisation sets it, and what an engine merely claims proves nothing",
    "api_key": "--engine-key-variable names an environment variable that holds it, which no list of processes shows",
    "admin_api_key": "there is one key for everything, which --engine-key-variable names",
    "ssl_keyfile": "engines are spoken to over plain HTTP",
    "ssl_certfile": "engines are spoken to over plain HTTP",
    "ssl_ca_certs": "engines are spoken to over plain HTTP",
    "ssl_keyfile_password": "engines are spoken to over plain HTTP",
    "grpc_port": "engines are spoken to over plain HTTP, and nothing else of them asks for the key",
    "grpc_mode": "engines are spoken to over plain HTTP, and nothing else of them asks for the key",
    "smg_grpc_mode": "engines are spoken to over plain HTTP, and nothing else of them asks for the key",
    "config": "a file of arguments would not be checked: put them in the table [sglang]",
    "help": "`PYTHON -m sglang.launch_server --help` prints it, with the Python of --sglang-python",
}
"""Arguments of SGLang that a run may not pass, by their place in `ServerArgs`, and why."""

_TIMEOUT = 300.0
_FIND_TIMEOUT = 60.0
_LAST_LINES = 5
_NAMED_AT_MOST = 5
_FIND = """
import importlib.metadata, importlib.util, json, sys
spec = importlib.util.find_spec("sglang")
try:
    version = importlib.metadata.version("sglang")
except importlib.metadata.PackageNotFoundError:
    version = ""
where = spec and (spec.origin or next(iter(spec.submodule_search_locations), ""))
print(json.dumps([where, version, sys.version_info[:2]]))
"""


class Installed(msgspec.Struct, frozen=True):
    """The SGLang that an interpreter has."""

    python: str
    path: str
    version: str
    """As its distribution says; empty for a source tree."""

    @property
    def name(self) -> str:
        return f"SGLang {self.version}".strip()


class Verdict(msgspec.Struct, frozen=True):
    """What SGLang says of the arguments of a run."""

    words: list[str]
    """The command line of those that it accepts, in the order given."""
    problems: dict[str, str]
    """What is wrong with the others, by the name that was given."""


class _Judged(msgspec.Struct, omit_defaults=True):
    """What `ask_server_args.py` says of one argument: one of these."""

    words: list[str] = []
    problem: str = ""
    unknown: bool = False
    owned: str = ""


class _Answer(msgspec.Struct):
    flags: list[str]
    arguments: dict[str, _Judged]


def cpu_environment() -> dict[str, str]:
    """Return what SGLang needs in its environment to run without a GPU.

    One thread for each process, unless the environment says otherwise: with more on busy cores it gets slower.
    """
    return {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


@functools.cache
def find_sglang(python: str) -> Installed:
    """Find the SGLang of an interpreter without importing it. Raises `ServiceError` where there is none."""
    try:
        found = subprocess.run(
            [python, "-c", _FIND],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_FIND_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{python} cannot be run: {error}") from error
    try:
        where, version, running = json.loads(found.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise ServiceError(f"{python} is no Python: it said {(found.stdout + found.stderr)[-300:]!r}") from error
    if not where:
        raise ServiceError(f"{python} (Python {'.'.join(map(str, running))}) has no SGLang")
    return Installed(python, where, version)


def ask_arguments(installed: Installed, given: Mapping[str, Any], ours: Collection[str] = ()) -> Verdict:
    """Let SGLang's own parser judge arguments, by name without dashes. Raises `ServiceError` if it cannot be asked.

    A name that SGLang does not know may be a misspelt one of `ours`. Importing SGLang takes seconds: a judgement is
    kept in the user's cache directory for the same installation and the same arguments.
    """
    if not given:
        return Verdict([], {})
    # A date of a run file becomes the word that stood there.
    question = json.dumps({"given": given, "owned": sorted(OWNED)}, default=str)
    file = _cache_file(installed, question)
    answer = _kept(file)
    if answer is None:
        answer = _ask(installed, question)
        _keep(file, answer)
    known = [*answer.flags, *(flag_of(name) for name in ours)]
    words = [word for one in answer.arguments.values() for word in one.words]
    said = {name: _problem(installed, one, known, flag_of(name)) for name, one in answer.arguments.items()}
    return Verdict(words, {name: text for name, text in said.items() if text})


def _problem(installed: Installed, one: _Judged, known: list[str], flag: str) -> str:
    if one.owned:
        return f"not passed on: {OWNED[one.owned]}"
    if one.unknown:
        longer = [other for other in known if other.startswith(f"{flag}-")]
        near = (
            f"; it has {', '.join(map(repr, longer))}"
            if 0 < len(longer) <= _NAMED_AT_MOST
            else did_you_mean(flag, known)
        )
        return f"no argument of {installed.name} ({installed.path}){near}".replace("'--", "'--sglang-")
    return f"{installed.name} says: {one.problem.removeprefix(f'argument {flag}: ')}" if one.problem else ""


def _ask(installed: Installed, question: str) -> _Answer:
    script = Path(__file__).with_name("ask_server_args.py")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        try:
            done = subprocess.run(
                [installed.python, str(script), str(answer)],
                input=question,
                check=False,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired as error:
            raise ServiceError(f"{installed.name} did not say within {_TIMEOUT:g} s what it accepts") from error
        if done.returncode != 0 or not answer.is_file():
            last = "\n  ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
            raise ServiceError(f"{installed.name} of {installed.python} cannot be imported:\n  {last}")
        return msgspec.json.decode(answer.read_bytes(), type=_Answer)


def _cache_file(installed: Installed, question: str) -> Path:
    """Name a judgement by all that it depends on; what changes inside an editable installation is not seen."""
    script, package = Path(__file__).with_name("ask_server_args.py").read_bytes(), Path(installed.path)
    # The folder that SGLang lies in changes with whatever is installed beside it, such as a plugin of it.
    stamps = [str(path.stat().st_mtime_ns) for path in (package, package.parent.parent) if path.exists()]
    parts = [*msgspec.structs.astuple(installed), *stamps, question, os.environ.get("PYTHONPATH", "")]
    name = hashlib.sha256("\0".join(parts).encode() + script).hexdigest()[:32]
    # Not `Path.expanduser`, which raises for a user without a home.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "miles", f"sglang-{name}.json")  # noqa: PTH111


def _kept(file: Path) -> _Answer | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Answer)
    except (OSError, msgspec.MsgspecError):
        return None


def _keep(file: Path, answer: _Answer) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_bytes(msgspec.json.encode(answer))
        aside.replace(file)
    except OSError:
        return  # it is asked again next time
