"""The reward of Search-R1: exact match, and what the right form is worth (arXiv 2503.09516, 2505.15117)."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING, Any

from miles_api.errors import SampleError
from miles_hooks_contrib.search_r1.options import SearchRewardOptions
from miles_hooks_contrib.search_r1.tags import has_right_form, texts_in

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["exact_match", "final_answer", "normalized", "reward"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return text as Natural Questions compares it: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def final_answer(response: str) -> str | None:
    """Return the last answer of a response; None without one."""
    answers = [said for _, said in texts_in("answer", response)]
    return answers[-1].strip() if answers else None


def exact_match(answer: str, accepted: list[str]) -> bool:
    """Say whether an answer is one of those accepted, after normalisation."""
    return normalized(answer) in {normalized(one) for one in accepted}


async def reward(args: Args, sample: Sample) -> dict[str, float]:
    """Score one conversation: `score` is what trains (`--reward-key score`); the others are 0 or 1, for the curves.

    `exact_match`: the answer is right; `format`: the response has the right form; `searched`: passages were shown. The
    label is a text, a list of texts, or `{"target": …}` of these. Raises `SampleError` for any other.
    """
    accepted = _accepted(sample)
    answer = final_answer(sample.response)
    right = answer is not None and exact_match(answer, accepted)
    form = has_right_form(sample.response)
    return {
        "score": _score(args, sample.response, accepted, right, form),
        "exact_match": float(right),
        "format": float(form),
        "searched": float(any(texts_in("information", sample.response))),
    }


reward.options = SearchRewardOptions  # type: ignore[attr-defined]


def _score(args: Args, response: str, accepted: list[str], right: bool, form: bool) -> float:
    if right:
        return 1.0 if form else 1.0 - args.search_format_score
    if form:
        return args.search_format_score + args.search_retrieval_score * _was_shown(response, accepted)
    return args.search_answer_score if final_answer(response) is not None else 0.0


def _was_shown(response: str, accepted: list[str]) -> bool:
    """Say whether a passage contains an accepted answer."""
    shown = [normalized(text) for _, text in texts_in("information", response)]
    return any(normalized(one) in text for one in accepted for text in shown)


def _accepted(sample: Sample) -> list[str]:
    label: Any = sample.label
    target = label.get("target") if isinstance(label, dict) else label
    accepted = [target] if isinstance(target, str | int | float) else target
    if not (isinstance(accepted, list) and accepted and all(isinstance(one, str | int | float) for one in accepted)):
        raise SampleError(
            f"sample {sample.index}: its label is {label!r:.200}; search_r1 compares with a text, a list of texts, or "
            '{"target": …} of these'
        )
    return [str(one) for one in accepted]
