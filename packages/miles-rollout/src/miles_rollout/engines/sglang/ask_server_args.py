"""Asks the installed SGLang about arguments: `ask_server_args.py ANSWER_FILE < {"given": {…}, "owned": […]}`.

Runs under the interpreter that has SGLang, and needs nothing else. The answer is `{"flags": […], "arguments": {name:
{"words": […]} | {"problem": text} | {"unknown": true} | {"owned": dest}}}`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

_MODEL = ["--model-path", "model"]
_NUMBER = re.compile(r"-\.?\d[\d.e+-]*")


class _Refused(Exception):  # noqa: N818  not an error of this program
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise _Refused(message)

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        raise _Refused(message or f"it would print something and exit with {status}")


def main(argv: list[str]) -> int:
    """Write what SGLang's own parser says of each given argument."""
    request = json.load(sys.stdin)
    parser = _server_args_parser()
    arguments = {name: _judge(parser, name, value, request["owned"]) for name, value in request["given"].items()}
    flags = sorted(flag for flag in parser._option_string_actions if flag.startswith("--"))
    Path(argv[0]).write_text(json.dumps({"flags": flags, "arguments": arguments}), encoding="utf-8")
    return 0


def _server_args_parser() -> argparse.ArgumentParser:
    with contextlib.suppress(ModuleNotFoundError):  # older versions have no plugins
        importlib.import_module("sglang.srt.plugins").load_plugins()
    parser = _Parser(prog="sglang", allow_abbrev=False)
    importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


def _judge(parser: argparse.ArgumentParser, name: str, value: Any, owned: list[str]) -> dict[str, Any]:
    spellings = [f"--{name.replace('_', '-')}", f"--{name}"]
    flag = next((flag for flag in spellings if flag in parser._option_string_actions), None)
    if flag is None:
        return {"unknown": True}
    action = parser._option_string_actions[flag]
    if action.dest in owned:
        return {"owned": action.dest}
    try:
        words = _words(flag, action, value)
        parser.parse_args([*_MODEL, *words])
    except _Refused as error:
        return {"problem": str(error)}
    except Exception as error:  # an argument's own type may raise anything
        return {"problem": f"{type(error).__name__}: {error}"}
    return {"words": words}


def _words(flag: str, action: argparse.Action, value: Any) -> list[str]:
    switch = action.nargs == 0
    if value is True and (switch or action.nargs in ("?", "*")):
        return [flag]
    if value is False and switch:
        negative = "--no-" + flag.removeprefix("--")
        return [negative] if negative in action.option_strings else []
    if value is True and not isinstance(action, argparse._StoreAction):
        return [flag]
    if value is True:
        raise _Refused(f"argument {flag}: expected a value")
    if switch:
        raise _Refused(f"argument {flag}: a switch, it takes no value")
    if isinstance(value, list) and action.nargs is None:
        raise _Refused(f"argument {flag}: expected one value, not {len(value)}")
    words = [_word(each) for each in (value if isinstance(value, list) else [value])]
    if len(words) > 1 and (flags := [word for word in words if word.startswith("-") and not _NUMBER.fullmatch(word)]):
        raise _Refused(f"argument {flag}: {flags[0]!r} is an argument of its own, and no value of this one")
    # What begins with a dash is a value only behind the sign.
    return [f"{flag}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [flag, *words]


def _word(value: Any) -> str:
    if isinstance(value, bool | dict | list):
        return json.dumps(value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
