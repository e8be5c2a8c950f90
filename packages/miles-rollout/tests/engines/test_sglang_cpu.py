"""`miles sglang-cpu` against a stand-in for the environment's Python, which writes down what it is told to run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import miles_rollout.engines.sglang_cpu as package
from miles_api.errors import ConfigError, ServiceError
from miles_rollout.engines.sglang_cpu.command import command

SHIMS = Path(package.__file__).parent / "shims.py"
ONLY_PINNED = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pinned wheels are for Python 3.11")


@pytest.fixture
def environment(tmp_path):
    """A virtual environment whose Python is a script, with torch as it stands after its installation."""

    def make(cuda="None", script='echo "$*" >> "$0.log"'):
        root = tmp_path / "environment"
        for folder in ("bin", "lib/python3.11/site-packages/torch"):
            (root / folder).mkdir(parents=True)
        (root / "pyvenv.cfg").touch()
        (root / "lib/python3.11/site-packages/torch/version.py").write_text(f"cuda = {cuda}\n")
        (root / "bin/python").write_text(f"#!/bin/sh\n{script}\n")
        (root / "bin/python").chmod(0o755)
        (root / "bin/pip").touch()
        return root

    return make


def run(directory, *pip_args):
    return command.run(argparse.Namespace(directory=directory, pip_arg=list(pip_args)))


@ONLY_PINNED
def test_a_complete_environment_is_only_tried_again(environment):
    root = environment()
    log = root / "bin/python.log"
    assert run(root, "--no-index") == 0
    steps = log.read_text().splitlines()
    assert [words.split()[:3] == ["-m", "pip", "install"] for words in steps] == [True, True, False]
    assert all("--no-index" in words and "--no-deps" in words for words in steps[:2])
    shims = (root / "lib/python3.11/site-packages/miles_sglang_cpu_shims.pth").read_text()
    assert shims == "import miles_sglang_cpu_shims\n"
    assert run(root) == 0
    assert log.read_text().splitlines()[3:] == [steps[2]]


@ONLY_PINNED
def test_an_environment_that_was_broken_off_before_it_had_pip_is_made_again(environment, monkeypatch):
    root = environment()
    (root / "bin/pip").unlink()
    made = []
    monkeypatch.setattr("venv.create", lambda directory, **_: made.append(directory))
    assert run(root) == 0
    assert made == [root]


@ONLY_PINNED
def test_an_environment_whose_import_fails_is_not_taken_for_complete(environment):
    root = environment(script='echo "$*" >> "$0.log"; case "$1" in -c) echo no dill >&2; exit 1;; esac')
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"cannot try SGLang .*\nno dill"):
            run(root)
    assert len((root / "bin/python.log").read_text().splitlines()) == 6


@ONLY_PINNED
def test_a_cuda_build_of_torch_is_refused_before_anything_else_is_installed(environment):
    root = environment(cuda="'13.0'")
    with pytest.raises(ServiceError, match=r"CUDA build of torch.*PIP_EXTRA_INDEX_URL"):
        run(root)
    assert len((root / "bin/python.log").read_text().splitlines()) == 1


@ONLY_PINNED
def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="no virtual environment"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path / "thesis.tex")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kernel_can_be_imported_and_says_why_it_cannot_be_called(tmp_path):
    (tmp_path / "shims.py").write_bytes(SHIMS.read_bytes())
    program = "import shims; from sgl_kernel import merge_state_v2 as kernel; kernel(1)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "RuntimeError: sgl_kernel.merge_state_v2 is a CUDA kernel" in done.stderr
