"""The reward of the quickstart: 1 for the digits in order, else 0. Change it and run again."""


def sorted_digits(args, sample):
    """Score one answer; `sample.label` holds the sorted digits."""
    return 1.0 if sample.response == sample.label else 0.0
