"""Sort digits, up or down: which of the two a prompt wants, it does not say, and nothing in it gives away."""

import hashlib

UP = 0.6
"""Share of the prompts that want their digits in rising order."""


def hidden_order(args, sample):
    """Score one answer; `sample.label` holds the digits in rising order."""
    drawn = hashlib.sha256(sample.label.encode()).digest()[0] / 256
    return 1.0 if sample.response == (sample.label if drawn < UP else sample.label[::-1]) else 0.0
