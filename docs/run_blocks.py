"""Run the code blocks of a page, so that all that it shows was run.

- A `python` or `toml` block that begins with `# file: NAME` is written to that file, any other `python` block is run.
- In a `console` block each line `$ COMMAND` is run by bash, and what stands below it has to be in its output, line by
  line and in this order; spaces do not count, and lines of the output may be left out. `…` stands for any text.
  A command ends well unless `# exits N` follows it.
- `$ pip install NAME …` is not run: the tests' environment has what the page names. `$ pip install .` installs the
  distribution of `pyproject.toml` as pip would, without a build backend: modules, name, version, requirements, entry
  points.
- Blocks of another language are not run.

`python docs/run_blocks.py PAGE.md FOLDER [SECTION …]` does it by hand, in FOLDER, and shows all output.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

__all__ = ["Block", "blocks", "run_blocks"]

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# file: (\S+)\n")
_COMMAND = re.compile(r"^\$ ", re.MULTILINE)
_EXITS = re.compile(r"# exits (\d+)$")
_SITE = "site"


class Block(NamedTuple):
    """One code block and where it stands."""

    language: str
    text: str
    section: str
    """The heading of second order above it, without the marks."""
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^## (.+)$", _FENCE.sub("", before), re.MULTILINE)
        found.append(Block(match[1], match[2], headings[-1] if headings else "", before.count("\n") + 2))
    return found


def run_blocks(page: Path, folder: Path, sections: list[str] | None = None) -> int:
    """Run the blocks of a page, or of some of its sections, in `folder`; return how many commands and scripts ran.

    Raises `AssertionError` naming page, line and command for what fails or says something else than the page shows.
    """
    shell = _Shell(folder)
    ran = 0
    for block in blocks(page):
        if sections is not None and block.section not in sections:
            continue
        where = f"{page.name}:{block.line}"
        named = _FILE.match(block.text)
        if named and block.language in ("python", "toml", "json"):
            (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            shell.run([sys.executable, "-c", block.text], where, 0, "")
            ran += 1
        elif block.language == "console":
            ran += _run_console(shell, block.text, where)
    return ran


def _run_console(shell: _Shell, text: str, where: str) -> int:
    commands = _COMMAND.split(text)[1:]
    for said in commands:
        command, _, shown = said.replace("\\\n", " ").partition("\n")
        exits = _EXITS.search(command)
        if command.strip() == "pip install .":
            _install(shell.folder)
        elif not command.startswith("pip install "):
            shell.run(["bash", "-c", command], where, int(exits[1]) if exits else 0, shown)
    return len(commands)


class _Shell:
    """Runs commands in one folder, with the interpreter of the tests first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [str(folder / _SITE), os.environ.get("PYTHONPATH", "")]
        self._environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "120", "NO_COLOR": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }  # fmt: skip

    def run(self, command: list[str], where: str, code: int, shown: str) -> None:
        """Run a command, and compare its exit code and output with what the page says."""
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=280, check=False,
        )  # fmt: skip
        said = f"{where}: {command[-1].strip()}\n{done.stdout}"
        if __name__ == "__main__":
            print(said)
        assert done.returncode == code, f"{said}\nexit code {done.returncode}, expected {code}"
        missing = _first_missing(shown, done.stdout)
        assert missing is None, f"{said}\nthe page shows, and the output above has not (in this order): {missing}"


def _first_missing(shown: str, output: str) -> str | None:
    """Return the first line of `shown` that `output` does not have after the lines before it."""
    lines = iter(_squeezed(line) for line in output.splitlines())
    for wanted in filter(None, map(_squeezed, shown.splitlines())):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        if wanted != "…" and not any(pattern.fullmatch(line) for line in lines):
            return wanted
    return None


def _squeezed(line: str) -> str:
    return " ".join(line.split())


def _install(folder: Path) -> None:
    """Install the distribution in `folder` into the folder's own site directory."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = folder / _SITE
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "src", site, dirs_exist_ok=True)
    requires = "".join(f"Requires-Dist: {one}\n" for one in project["dependencies"])
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(points), encoding="utf-8")


if __name__ == "__main__":
    run_blocks(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3:] or None)
