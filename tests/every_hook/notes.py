"""What the hooks of this folder saw, for the test to read: one JSON line a call."""

import json
import os
from pathlib import Path

SEEN = Path(os.environ["MILES_TEST_SEEN"])


def saw(hook, **facts):
    """Append what one call of a hook saw."""
    with (SEEN / f"{hook}.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")


def kinds(column):
    """Describe a column of tensors: how many, and their dtypes and ranks."""
    return [len(column), *sorted({f"{value.dtype}/{value.ndim}" for value in column})]
