"""What can be said of a tokenizer from its files alone, without transformers: that it loads, and its chat template."""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import msgspec
from tokenizers import Tokenizer

from miles_api.errors import ConfigError, DataError

__all__ = ["ChatTemplate", "check_tokenizer", "read_object", "require_tokenizer"]

_CONFIG = "tokenizer_config.json"
_WHOLE = "tokenizer.json"


def require_tokenizer(path: str | None) -> None:
    """Raise `DataError` if `path` is a directory without tokenizer files, `ConfigError` if there is none."""
    if path is None:
        raise ConfigError("--hf-checkpoint is not set: name a directory with a tokenizer")
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in (_WHOLE, _CONFIG)):
        raise DataError(f"--hf-checkpoint {path} holds no tokenizer ({_WHOLE} or {_CONFIG})")


def check_tokenizer(path: str) -> ChatTemplate:
    """Read the tokenizer's files as far as they can be without transformers; return its chat template.

    Raises `DataError`. A tokenizer that only transformers can build (no tokenizer.json) is not looked into further.
    """
    require_tokenizer(path)
    whole = Path(path, _WHOLE)
    if whole.is_file():
        try:
            Tokenizer.from_file(str(whole))
        except Exception as error:  # the Rust library raises plain Exception
            raise DataError(f"--hf-checkpoint {path}: the tokenizer does not load: {whole}: {error}") from error
    return ChatTemplate(path)


class ChatTemplate:
    """The chat template of a model directory, rendered as transformers renders it."""

    def __init__(self, path: str) -> None:
        self._path = path
        config = read_object(Path(path, _CONFIG))
        self._tokens = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }
        self._named = _templates(Path(path), config)

    @property
    def text(self) -> str:
        """The template for conversations with tools; empty where there is none."""
        return self._named.get("tool_use") or self._named.get("default") or ""

    def apply_chat_template(
        self,
        messages: Any,
        *,
        tools: Any = None,
        tokenize: bool = False,
        chat_template: str | None = None,
        **keywords: Any,
    ) -> str:
        """Render messages to text; `ValueError` without a template, what the template raises otherwise."""
        assert not tokenize
        source = chat_template or self._named.get("tool_use" if tools and "tool_use" in self._named else "default")
        if source is None:
            raise ValueError(f"the tokenizer in {self._path} has no chat template")
        return _compiled(source).render(messages=messages, tools=tools, documents=None, **self._tokens | keywords)


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the templates by name: files of their own come before the tokenizer's config."""
    named: dict[str, str] = {}
    inside = config.get("chat_template")
    if isinstance(inside, str):
        named["default"] = inside
    elif isinstance(inside, list):
        named = {entry["name"]: entry["template"] for entry in inside}
    if (folder / "chat_template.json").is_file():
        named["default"] = read_object(folder / "chat_template.json")["chat_template"]
    if (folder / "chat_template.jinja").is_file():
        named["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in folder.glob("additional_chat_templates/*.jinja"):
        named[file.stem] = file.read_text(encoding="utf-8")
    return named


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object, an empty one where there is no file; `DataError` for anything else."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise DataError(f"{file} is not a JSON object: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what the model says; to render, it is its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    world = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    world.filters["tojson"] = _to_json
    known: dict[str, Any] = {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    world.globals |= known
    return world.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
