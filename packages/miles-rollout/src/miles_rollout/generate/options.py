"""What can be set about conversations of several turns."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from miles_api.options import Options

__all__ = ["GenerateOptions"]

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class GenerateOptions(Options, frozen=True, kw_only=True):
    """Conversations of several turns, with tools."""

    generate_max_turns: _Positive = 16
    """Most answers of the model in one conversation of `multi_turn`; one that still calls tools then is truncated."""
    generate_tool_call_parser: str = "auto"
    """How the model writes tool calls: hermes (qwen25), qwen3_coder, glm45, llama3, pythonic, mistral, deepseekv3,
    deepseekv31, kimi_k2, or another of SGLang's names where SGLang is installed; `auto` asks the tokenizer's files."""
    generate_multi_samples: bool = False
    """Make each answer of `multi_turn` a sample of its own, with what the chat template renders for it as its prompt;
    exact also for templates that rewrite earlier messages. The reward of the last answer is that of all."""
    generate_turn_timeout: _Seconds | None = None
    """Seconds one answer of `multi_turn` may take; past it the conversation is truncated before that answer. Default:
    only --generate-timeout, past which the run stops."""
    generate_tool_timeout: _Seconds = 300.0
    """Seconds one tool call of `multi_turn` may take; past it the model is told so, and the conversation goes on."""
    generate_max_tool_response_len: _Positive | None = None
    """Most tokens of one tool's output that the model is shown; of a longer one, the middle is left out."""
    agent_max_turns: _Positive = 128
    """Most answers that one agent may ask for, over all branches of its conversations."""
    agent_max_samples: _Positive = 16
    """Most conversations of one agent, each of which becomes a sample; 1 refuses a request that does not continue the
    one recorded."""
    agent_message_matching: Literal["exact", "tolerant"] = "exact"
    """How a request's messages are compared with those recorded: `tolerant` looks past white space and the order of
    keys, for agents that write a history anew."""
