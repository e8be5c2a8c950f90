"""Which parser a run uses: the one named, or the one that the tokenizer's files point to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError
from miles_api.options import options_from
from miles_rollout.generate.options import GenerateOptions
from miles_rollout.generate.tool_parsers.declared import DeclaredParser
from miles_rollout.generate.tool_parsers.formats import ALIASES, FORMATS, MARKS
from miles_rollout.generate.tool_parsers.pythonic import pythonic
from miles_rollout.generate.tool_parsers.sglang import sglang_parser
from miles_rollout.tokenizer_files import ChatTemplate, read_object

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_rollout.generate.tool_calls import Parser

__all__ = ["check_parser", "named_parser", "parser_for"]

_AUTO, _PYTHONIC = "auto", "pythonic"
_FLAG = "--generate-tool-call-parser"


def parser_for(args: Args, tokenizer: Any) -> Parser:
    """Return the parser of `--generate-tool-call-parser`; `auto` asks the tokenizer.

    A tokenizer with a `response_template` of its own says how to read its model; else the chat template shows it.
    Raises `ConfigError` with the choices where it does not.
    """
    options: GenerateOptions = options_from(args, GenerateOptions)
    name = options.generate_tool_call_parser
    if name != _AUTO:
        return named_parser(name)
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return DeclaredParser(own)
    template = args.apply_chat_template_kwargs.get("chat_template") or tokenizer.chat_template
    return named_parser(_told_by(template if isinstance(template, str) else "\n".join((template or {}).values())))


def named_parser(name: str) -> Parser:
    """Return a parser by name: ours, by any name SGLang has for it, else SGLang's; `ConfigError` if there is none."""
    return _parser(ALIASES.get(name, name))


@functools.cache
def _parser(name: str) -> Parser:
    if name == _PYTHONIC:
        return pythonic
    if name in FORMATS:
        return DeclaredParser(FORMATS[name])
    parser = sglang_parser(name)
    if parser is None:
        raise ConfigError(
            f"{_FLAG} {name} is not among {_names()}; further names are SGLang's, which is not installed here"
        )
    return parser


def check_parser(name: str, folder: str, template: str | None = None) -> None:
    """Raise `ConfigError` if `name` is no parser, or if it is `auto` and the files in `folder` do not tell which.

    `template` is what the run uses in place of the tokenizer's chat template. What is no folder is not looked at, and
    transformers is not imported.
    """
    if name in (_PYTHONIC, *FORMATS, *ALIASES):
        return
    if name != _AUTO:
        named_parser(name)
    elif Path(folder).is_dir() and "response_template" not in read_object(Path(folder, "tokenizer_config.json")):
        _told_by(template or ChatTemplate(folder).text)


def _told_by(template: str) -> str:
    """Return the name of the format in which a chat template writes calls."""
    found = next((name for mark, name in MARKS.items() if mark in template), None)
    if found is None:
        raise ConfigError(
            f"{_FLAG} auto: the tokenizer's chat template does not show how its model writes a tool call. Name one of "
            f"{_names()}, and tell the model in the prompt to write that"
        )
    return found


def _names() -> str:
    return ", ".join(sorted((_PYTHONIC, *FORMATS, *ALIASES)))
