"""Search-R1: the model reasons and searches by turns (arXiv 2503.09516)."""

from miles_hooks_contrib.search_r1.generate import SearchR1
from miles_hooks_contrib.search_r1.reward import reward

__all__ = ["SearchR1", "reward"]
