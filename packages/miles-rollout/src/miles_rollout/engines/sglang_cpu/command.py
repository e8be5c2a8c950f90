"""`miles sglang-cpu DIR`: make an environment in which an unmodified SGLang serves on a CPU."""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["ENVIRONMENT", "SglangCpuCommand", "command"]

_HERE = Path(__file__).parent
_TORCH = "torch==2.13.0"
_PYTHON = (3, 11)
_MARKER, _SHIMS = "miles-sglang-cpu", "miles_sglang_cpu_shims"
_TAIL = 15
"""Lines of a failed step that are shown."""

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
"""What SGLang's processes need on a CPU; the last three keep several of them from fighting for its cores."""


class SglangCpuCommand:
    """Make the environment, or complete one that was begun; a complete one is only tried."""

    help = "make an environment in which SGLang serves on a CPU"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments to `parser`."""
        parser.add_argument("directory", metavar="DIR", type=Path, help="where it is made; 2.0 GB when complete")
        parser.add_argument(
            "--pip-arg",
            action="append",
            default=[],
            metavar="ARG",
            help="given to each `pip install`, as in --pip-arg=--no-index (repeatable)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Make it and try it; return the exit status.

        Raises `ConfigError` for a directory that holds something else or a Python that the list is not for, and
        `ServiceError` with the last lines of a step that failed.
        """
        if sys.version_info[:2] != _PYTHON:
            wanted = ".".join(map(str, _PYTHON))
            raise ConfigError(f"the pinned wheels are for Python {wanted}, and this is {sys.version.split()[0]}")
        directory = args.directory.absolute()
        python, marker = directory / "bin" / "python", directory / _MARKER
        if not _holds(marker):
            _refuse_other(directory)
            _install(directory, python, args.pip_arg)
        _run("try SGLang", [str(python), "-c", _TRY], env={**os.environ, **ENVIRONMENT})
        marker.write_text(_digest())
        print(_how_to_serve(python))
        return 0


command = SglangCpuCommand()
"""The object `miles.commands` offers as `sglang-cpu`."""

_TRY = "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler"


def _digest() -> str:
    """Return what an environment must have been made from to be complete."""
    made_from = b"".join((_HERE / name).read_bytes() for name in ("packages.txt", "shims.py"))
    return hashlib.sha256(_TORCH.encode() + made_from).hexdigest()


def _holds(marker: Path) -> bool:
    return marker.is_file() and marker.read_text() == _digest()


def _refuse_other(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file; name a directory that is to be made")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "pyvenv.cfg").is_file():
        raise ConfigError(f"{directory} holds something that is no virtual environment; name one that is to be made")


def _install(directory: Path, python: Path, pip_args: Sequence[str]) -> None:
    # pip comes last: without it the making of the environment was broken off.
    if not (python.is_file() and python.with_name("pip").is_file()):
        print(f"miles sglang-cpu: making {directory}", flush=True)
        venv.create(directory, with_pip=True, symlinks=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_args]
    _run(f"install {_TORCH}", [*pip, "--no-deps", _TORCH])
    packages = next(iter(sorted(directory.glob("lib/python*/site-packages"))))
    # Read, not imported: what torch imports is not there yet.
    if runpy.run_path(str(packages / "torch" / "version.py"))["cuda"] is not None:
        raise ServiceError(f"{directory} got a CUDA build of torch; {_CPU_TORCH}")
    _run("install SGLang and what it imports", [*pip, "--no-deps", "--requirement", str(_HERE / "packages.txt")])
    (packages / f"{_SHIMS}.py").write_bytes((_HERE / "shims.py").read_bytes())
    (packages / f"{_SHIMS}.pth").write_text(f"import {_SHIMS}\n")


_CPU_TORCH = (
    "it does not start without the CUDA packages. Remove the directory and run this again with "
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, where the CPU build is"
)


def _without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(what: str, words: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Run one step, quietly. Raises `ServiceError` with its last lines if it fails."""
    print(f"miles sglang-cpu: {what}", flush=True)
    done = subprocess.run(
        words, env=env or _without_path(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_TAIL:])
        raise ServiceError(f"cannot {what} (status {done.returncode}):\n{said}")


def _how_to_serve(python: Path) -> str:
    variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    return (
        f"\nSGLang is ready in {python}. To serve a model by hand:\n\n"
        f"  {variables} \\\n  {python} -m sglang.launch_server --device cpu --dtype float32 \\\n"
        "    --mem-fraction-static 0.1 --max-total-tokens 32768 --sleep-on-idle --model-path MODEL\n\n"
        f"The tests of real SGLang run with MILES_SGLANG_PYTHON={python}"
    )
