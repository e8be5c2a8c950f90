"""Can each prompt of a file be scored: what graders read in labels and metadata, looked at before a run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from miles_api.errors import ConfigError, problem_of
from miles_rollout.rewards.dispatch import KINDS, data_check_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from miles_rollout.jsonl import Prompt
    from miles_rollout.options import RewardOptions

__all__ = ["prompt_problems"]

_MOST = 5
"""Different problems that are told of one file."""


def prompt_problems(prompts: Iterable[Prompt], options: RewardOptions) -> Iterator[str]:
    """Yield what is wrong with labels and metadata for the built-in kinds that score them: each problem once.

    An unknown kind and one whose library is absent are not told here: `check_rm_type` is for those.
    """
    first: dict[str, int] = {}
    times: Counter[str] = Counter()
    for number, prompt in enumerate(prompts, start=1):
        for text in _problems(prompt, options):
            first.setdefault(text, number)
            times[text] += 1
    for text, number in list(first.items())[:_MOST]:
        yield f"prompt {number}: {text}" + (f" ({times[text]} prompts in all)" if times[text] > 1 else "")
    if len(first) > _MOST:
        yield f"and {len(first) - _MOST} other problems of this kind"


def _problems(prompt: Prompt, options: RewardOptions) -> Iterator[str]:
    named = prompt.metadata.get("rm_type")
    kinds = options.rm_weights if options.rm_weights else [named or options.rm_type]
    for kind in kinds:
        if kind is None or str(kind).removeprefix("boxed_") not in KINDS:
            continue
        try:
            check = data_check_of(str(kind))
        except ConfigError:
            continue
        if check is not None:
            yield from problem_of(lambda check=check: check(prompt.label, prompt.metadata))
