"""How each family of models writes a tool call, and which of them a run's model belongs to."""

from miles_rollout.generate.tool_parsers.choose import check_parser, named_parser, parser_for

__all__ = ["check_parser", "named_parser", "parser_for"]
