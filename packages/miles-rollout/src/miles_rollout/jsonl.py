"""Read prompt files: one JSON object a line, with an error that names file, line and reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec

from miles_api.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_rollout.options import DataOptions

__all__ = ["Prompt", "read_prompts", "rendered", "takes_messages"]


class Prompt(msgspec.Struct, frozen=True):
    """One line of a prompt file."""

    prompt: str | list[dict[str, Any]]
    label: Any
    metadata: dict[str, Any]


def takes_messages(args: Args) -> bool:
    """Say whether prompts may stay chat messages: a generate or rollout hook may render them itself, as tools need."""
    own = args.custom_generate_function_path or args.rollout_function_path
    return bool(own) and args.loss_type != "sft_loss"


def read_prompts(path: str, options: DataOptions, tokenizer: Any = None, *, messages: bool = False) -> list[Prompt]:
    """Read a whole JSONL prompt file; blank lines are skipped.

    With `--apply-chat-template` the tokenizer turns messages into text; without it they pass only if `messages`.
    Raises `DataError` for a missing or empty file, and for the first malformed line, naming it.
    """
    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, [p.name for p in file.parent.glob("*.jsonl")]) if file.parent.is_dir() else ""
        raise DataError(f"there is no prompt file {path}{near}")
    decoder = msgspec.json.Decoder(dict[str, Any])
    prompts = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompt = _prompt(decoder, line, options, tokenizer, f"{path}, line {number}")
                if not messages and not isinstance(prompt.prompt, str):
                    raise DataError(
                        f"{path}, line {number}: {options.input_key!r} holds chat messages; set --apply-chat-template"
                    )
                prompts.append(prompt)
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompt")
    return prompts


def _prompt(
    decoder: msgspec.json.Decoder[dict[str, Any]], line: bytes, options: DataOptions, tokenizer: Any, where: str
) -> Prompt:
    try:
        row = decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from error
    for key, flag in ((options.input_key, "--input-key"), (options.label_key, "--label-key")):
        if key is not None and key not in row:
            raise DataError(f"{where}: no key {key!r} ({flag}){did_you_mean(key, row)}")
    prompt = row[options.input_key]
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise DataError(f"{where}: {options.input_key!r} is neither a string nor a list of chat messages")
    metadata = row.get(options.metadata_key) or {}
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: {options.metadata_key!r} is not an object")
    if options.apply_chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        tools = row.get(options.tool_key) if options.tool_key else None
        prompt = rendered(tokenizer, messages, tools, options, f"{where}: --apply-chat-template")
    return Prompt(prompt, row[options.label_key] if options.label_key else None, metadata)


def rendered(tokenizer: Any, messages: Any, tools: Any, options: DataOptions, where: str) -> str:
    """Return chat messages as text in which the model speaks next; `DataError` if they do not fit the template."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **options.apply_chat_template_kwargs
        )
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        raise DataError(f"{where}: {error}") from error


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)
