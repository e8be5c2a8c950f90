"""Sort digits; blanks around the answer do not matter. The model of `prepare.py` pads, and nobody asks it to stop."""


def sorted_and_padded(args, sample):
    """Score one answer, blanks aside."""
    return 1.0 if sample.response.strip() == sample.label else 0.0
