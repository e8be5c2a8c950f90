"""reasoning-gym's own verifier as the reward.

A line of the prompt file carries `"metadata": {"task": "chain_sum", "entry": {…}}`. Verifiers are written for answers
that somebody cut out of a text, and a model hands them anything: some raise on junk, and some give it full marks. So
an answer is one short line that the verifier reads without complaint, or it earns nothing.
"""

import functools
import math
from typing import Any

from miles_api import Args, Sample

try:
    import reasoning_gym
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: `hatch run reasoning-gym:train` installs what this example needs") from error

__all__ = ["score", "verified"]

LONGEST_ANSWER = 200

# A task's verifier is a method of its data set; which entries that one would make does not matter.
_dataset_of = functools.cache(functools.partial(reasoning_gym.create_dataset, seed=0, size=1))


def score(answer: str, task: str, entry: dict[str, Any]) -> float:
    """Return the verifier's score in 0 … 1; 0 for an empty or overlong answer and one that the verifier chokes on."""
    if not answer or len(answer) > LONGEST_ANSWER:
        return 0.0
    try:
        value = float(_dataset_of(task).score_answer(answer, entry))
    except Exception:  # a verifier may raise anything on text nobody foresaw; the answer is wrong, not the run
        return 0.0
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def verified(args: Args, sample: Sample) -> float:
    """Score one answer by the entry in its metadata."""
    return score(sample.response.strip(), sample.metadata["task"], sample.metadata["entry"])
