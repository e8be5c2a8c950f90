"""What the report's sample browser is given of samples: plain values of bounded size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.rollout_types import flatten

if TYPE_CHECKING:
    from miles_api.rollout_types import Group

__all__ = ["shown_samples"]

_FIELDS = ("group_index", "index", "prompt", "response", "label", "reward", "status", "response_length")
_LONGEST = 2000
"""Characters of an entry of metadata: graders keep test cases there, and agents traces of megabytes."""
_encode = msgspec.json.Encoder(enc_hook=repr).encode


def shown_samples(groups: list[Group], count: int) -> list[dict[str, Any]]:
    """Return the samples of the first `count` groups with their metadata, of which long entries are cut."""
    return [
        {field: getattr(sample, field) for field in _FIELDS}
        | {"metadata": {str(name): _short(value) for name, value in sample.metadata.items()}}
        for sample in flatten(groups[:count])
    ]


def _short(value: Any) -> Any:
    """Return a value as JSON has it, or the beginning of its text."""
    try:
        content = _encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        # An own rollout may have put anything there, which is no reason to end its run.
        text = f"{value!r:.{_LONGEST + 1}}"
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    if len(content) <= _LONGEST:
        return msgspec.json.decode(content)
    text = value if isinstance(value, str) else content.decode()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
