"""Sort digits; spaces around the answer do not matter. The model of `prepare_padded.py` adds some, unasked."""


def sorted_and_padded(args, sample):
    """Score one answer, spaces aside."""
    return 1.0 if sample.response.strip() == sample.label else 0.0
