"""Instructions that code can verify (as in IFEval, arXiv 2311.07911), and the reward: the share of them followed.

A prompt file's line carries them as `"metadata": {"topic": "bread", "checks": {"no_commas": true, "max_words": 12}}`.
An answer that did not end by itself, says next to nothing or is not about its topic earns 0 whatever else it obeys:
without that, a few words with no comma would win.
"""

import re
from collections.abc import Callable
from typing import Any

from miles_api import Args, Sample, Status

__all__ = ["CHECKS", "follow_instructions", "share_followed"]

FEWEST_WORDS = 4


def no_commas(text: str, wanted: bool) -> bool:
    """There is no comma."""
    return ("," not in text) == wanted


def max_words(text: str, most: int) -> bool:
    """There are at most so many words."""
    return len(text.split()) <= most


def includes(text: str, word: str) -> bool:
    """The word appears as a word of its own, in upper or lower case."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def ends_with(text: str, phrase: str) -> bool:
    """The very last characters are the phrase."""
    return text.rstrip().endswith(phrase)


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    check.__name__: check for check in (no_commas, max_words, includes, ends_with)
}


def share_followed(text: str, topic: str, checks: dict[str, Any]) -> float:
    """Return which share of `checks` a finished answer follows; 0 if it says next to nothing or misses the topic."""
    if len(text.split()) < FEWEST_WORDS or topic.lower() not in text.lower():
        return 0.0
    return sum(CHECKS[name](text, value) for name, value in checks.items()) / len(checks)


def follow_instructions(args: Args, sample: Sample) -> float:
    """Score one answer by the instructions in its metadata."""
    if sample.status != Status.COMPLETED:
        return 0.0
    return share_followed(sample.response, sample.metadata["topic"], sample.metadata["checks"])
