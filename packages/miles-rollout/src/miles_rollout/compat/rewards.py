"""Rewards by the names and results of the older stacks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from miles_rollout.compat.state import state_of
from miles_rollout.group import gather
from miles_rollout.rewards.boxes import last_boxed
from miles_rollout.rewards.dapo import dapo_answer, dapo_right, minerva
from miles_rollout.rewards.dispatch import grade
from miles_rollout.rewards.f1 import squad_words

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = [
    "async_rm",
    "batched_async_rm",
    "compute_gpqa_reward",
    "compute_ifbench_reward",
    "compute_score",
    "extract_answer",
    "f1_score",
    "get_deepscaler_rule_based_reward",
    "grade_answer_verl",
    "last_boxed_only_string",
    "remove_boxed",
]

_BOXED_CHARACTERS = 100


async def async_rm(args: Args, sample: Sample, **kwargs: Any) -> Any:
    """Score a sample with the run's reward: the hook, or what `--rm-type` names."""
    state = state_of(args)
    return await state.guard.once(state.hooks.need("reward"), args, sample)


async def batched_async_rm(
    args: Args, samples: list[Sample], inplace_set_reward_field: bool = False, **kwargs: Any
) -> list[Any] | None:
    """Score samples together, with the group reward where the run has one; optionally set their rewards."""
    hook = state_of(args).hooks.one("group_reward")
    if hook is not None:
        rewards = list(await state_of(args).guard.once(hook, args, samples))
    else:
        rewards = await gather(*(async_rm(args, sample, **kwargs) for sample in samples))
    if not inplace_set_reward_field:
        return rewards
    for sample, value in zip(samples, rewards, strict=True):
        sample.reward = value
    return None


def last_boxed_only_string(text: str) -> str | None:
    """Return the last `\\boxed{…}` of a text with its braces; None without a closed one."""
    inner = last_boxed(text)
    return None if inner is None else f"\\boxed{{{inner}}}"


def remove_boxed(text: str | None) -> str | None:
    """Return what a `\\boxed{…}` holds; None where it is none."""
    return None if text is None else last_boxed(text)


def extract_answer(passage: str) -> str | None:
    """Return what the last `\\boxed{…}` of a passage holds; None without one."""
    return last_boxed(passage)


def grade_answer_verl(solution_str: str, ground_truth: Any) -> bool:
    """Say whether the boxed answer of a solution is the labelled one; without a box or a label it is not."""
    answer = last_boxed(solution_str) if solution_str else None
    if answer is None or not ground_truth:
        return False
    return grade("deepscaler", f"</think>\\boxed{{{answer}}}", ground_truth) == 1.0


def compute_score(
    solution_str: str,
    ground_truth: Any,
    strict_box_verify: bool = False,
    pause_tokens_index: list[int] | None = None,
) -> dict[str, Any]:
    """Score as DAPO does: 1 or -1 for the last line `Answer: …`, or for the last box if `strict_box_verify`.

    Returns `score`, `acc` and `pred`. A label of any kind scores: numbers, fractions, text.
    """
    if strict_box_verify:
        answer = last_boxed(solution_str[-_BOXED_CHARACTERS:])
        right, shown = answer is not None and answer == str(ground_truth), answer
    else:
        answer = dapo_answer(solution_str)
        right, shown = answer is not None and dapo_right(answer, ground_truth), answer and minerva(answer)
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": "[INVALID]" if shown is None else shown}


def compute_gpqa_reward(response: str | None, label: Any, metadata: dict[str, Any] | None = None) -> float:
    """Return 1.0 if a response names the right choice of a question, else 0.0: `--rm-type gpqa`."""
    return grade("gpqa", response, label, metadata)


def compute_ifbench_reward(response: str | None, label: Any, metadata: dict[str, Any] | None = None) -> float:
    """Return 1.0 if a response follows every instruction in `metadata`, else 0.0: `--rm-type ifbench`."""
    return grade("ifbench", response, label, metadata)


def get_deepscaler_rule_based_reward(response: str, label: Any) -> float:
    """Return 1.0 if the box after the thinking is the label, else 0.0: `--rm-type deepscaler`."""
    return grade("deepscaler", response, label)


_VERDICTS = ("yes", "no", "noanswer")


def f1_score(prediction: str | None, ground_truth: Any) -> tuple[float, float, float]:
    """Return token F1, precision and recall after SQuAD's normalisation; a yes or no must be exact."""
    if prediction is None:
        return 0.0, 0.0, 0.0
    said, wanted = squad_words(prediction), squad_words(str(ground_truth))
    if said != wanted and (" ".join(said) in _VERDICTS or " ".join(wanted) in _VERDICTS):
        return 0.0, 0.0, 0.0
    common = sum((Counter(said) & Counter(wanted)).values())
    if common == 0:
        return 0.0, 0.0, 0.0
    return 2 * common / (len(said) + len(wanted)), common / len(said), common / len(wanted)
