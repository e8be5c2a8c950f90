"""`miles hooks new NAME`: a hook file that runs, and a test beside it."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.cli.hooks.scaffold import function_name, hook_source, test_source
from miles_api.cli.hooks.words import find_spec
from miles_api.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from miles_api.spec import HookSpec

__all__ = ["HELP", "NAME", "configure", "run"]

NAME = "new"
HELP = "write a hook that runs, with a test; nothing is overwritten"

_ALSO = {
    "loss": "--loss-type custom_loss", "importance_weights": "--use-tis", "group_reward": "--group-rm",
    "eval_rollout": "--eval-interval 10", "eval_rollout_log": "--eval-interval 10",
    "agent": "--custom-generate-function-path agentic",
    "execute_tool": "--custom-generate-function-path multi_turn --generate-tool-specs-path YOUR_TOOLS.py:tool_specs",
    "tool_specs": "--custom-generate-function-path multi_turn --generate-execute-tool-function-path YOUR_TOOLS.py:run",
}  # fmt: skip
"""What a run needs besides the hook's own flag for the hook to be called."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", help="the hook's name, as `miles hooks list` has it")
    parser.add_argument(
        "--file", metavar="F", help="where to write it (default: my_NAME.py); its test is test_F beside"
    )


def run(options: argparse.Namespace) -> int:
    """Write both files and say what comes next."""
    spec = find_spec(options.name)
    file = Path(options.file or f"my_{spec.name}.py")
    if file.suffix != ".py" or not file.stem.isidentifier() or keyword.iskeyword(file.stem):
        raise ConfigError(f"--file {file}: expected the name of a Python module, such as my_{spec.name}.py")
    test = file.with_name(f"test_{file.name}")
    taken = [str(path) for path in (file, test) if path.exists()]
    if taken:
        raise ConfigError(f"{' and '.join(taken)} exists already and is not overwritten: choose another --file")
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, source in ((file, hook_source(spec, file)), (test, test_source(spec, file))):
        # "x" so that a file that appeared meanwhile is kept too.
        with path.open("x", encoding="utf-8") as out:
            out.write(source)
    print("\n".join([f"wrote {file} and {test}; next:", *(f"  {line}" for line in _next(spec, file))]))
    return 0


def _next(spec: HookSpec, file: Path) -> list[str]:
    reference = f"{file}:{function_name(spec)}"
    check = f"miles hooks check {reference} --as {spec.name}"
    if spec.flag is None:
        return [check, "move `abort` into the module of your agent function, where it is found without a flag"]
    return [check, " ".join(filter(None, ["miles train run.toml", spec.flag, reference, _ALSO.get(spec.name)]))]
