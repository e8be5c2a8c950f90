"""`reward` and `group_reward` on recorded samples: which scores change, which flip, and the means."""

# ruff: noqa: ARG002  all replayers are given the same, and each hook needs another part of it

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from miles_api.loading.plain import plain_number
from miles_api.replay.replayer import Replayer, excerpt, same
from miles_api.replay.subject import Subject
from miles_api.rollout_types import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.record import RecordedRollout
    from miles_api.sample import Sample

__all__ = ["GroupRewardReplayer", "RewardReplayer"]

_OWN_HOOK = "samples with a reward hook of their own"
_NO_GROUPS_IN_EVALUATION = "evaluations, which this run scores sample by sample"


class RewardReplayer(Replayer):
    """Scores sample by sample. A reward that generation had set cannot be told from one that the hook gave."""

    unit = "sample"

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._equal = self._flipped_up = self._flipped_down = self._unscored = self._compared = 0
        self._before = self._after = 0.0
        self._changes: list[dict[str, Any]] = []

    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        number = 0
        for group in record.groups:
            for sample in flatten([group.samples]):
                if sample.custom_rm_path is not None:
                    self.skip(_OWN_HOOK)
                    continue
                yield Subject(number, record.rollout_id, record.evaluation, [[sample]])
                number += 1

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.args, _unscored(subject.groups[0][0])), {}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        return self._checked(value, arguments[1], subject.evaluation)

    def compare(self, subject: Subject, result: Any) -> None:
        sample = subject.groups[0][0]
        assert not isinstance(sample, list)
        if self._compare_one(subject, sample, result):
            self.changed += 1

    def _key(self, evaluation: bool) -> str | None:
        own = self.args.eval_reward_key if evaluation and "eval_reward_key" in self.args else None
        return own or (self.args.reward_key if "reward_key" in self.args else None)

    def _checked(self, value: Any, sample: Sample, evaluation: bool) -> float | dict[str, float]:
        if not isinstance(value, dict):
            return plain_number(value, self.who, f"the reward of sample {sample.index}")
        key = self._key(evaluation)
        if key is None or key not in value:
            wanted = "--set reward_key=NAME picks one" if key is None else f"the reward key {key} is not among them"
            raise self.wrong(f"gave sample {sample.index} the rewards {sorted(map(str, value))}: {wanted}")
        what = f"of sample {sample.index}"
        return {str(name): plain_number(part, self.who, f"the reward {name!r} {what}") for name, part in value.items()}

    def _picked(self, reward: Any, evaluation: bool) -> float | None:
        if isinstance(reward, dict):
            reward = reward.get(self._key(evaluation))
        return None if reward is None else float(reward)

    def _compare_one(self, subject: Subject, sample: Sample, result: Any) -> bool:
        before = self._picked(sample.reward, subject.evaluation)
        after = self._picked(result, subject.evaluation)
        if before is None or after is None:
            self._unscored += 1
            return False
        self._compared += 1
        self._before += before
        self._after += after
        if same(before, after):
            self._equal += 1
            return False
        flipped = (after > self.threshold) - (before > self.threshold)
        self._flipped_up += flipped > 0
        self._flipped_down += flipped < 0
        if len(self._changes) < self.shown:
            self._changes.append({
                "sample": sample.index, "group": sample.group_index, "rollout": subject.rollout_id,
                "recorded": before, "new": after, "flipped": bool(flipped), "prompt": excerpt(_last(sample.prompt)),
                "response": excerpt(sample.response),
            })  # fmt: skip
        return True

    def facts(self) -> dict[str, Any]:
        count = self._compared
        return {
            "equal": self._equal, "changed": count - self._equal, "flipped_up": self._flipped_up,
            "flipped_down": self._flipped_down, "threshold": self.threshold, "without_recorded_reward": self._unscored,
            "mean_recorded": self._before / count if count else None,
            "mean_new": self._after / count if count else None, "changes": self._changes,
        }  # fmt: skip

    def lines(self) -> list[str]:
        count = self._compared
        lines = [f"equal     {self._equal}", f"changed   {count - self._equal}"]
        flipped = self._flipped_up + self._flipped_down
        if flipped:
            lines[-1] += (
                f"   {flipped} of them flipped at {self.threshold:g}: {self._flipped_up} up, {self._flipped_down} down"
            )
        if self._unscored:
            lines.append(f"scored    {self._unscored}   without a recorded reward to compare with")
        if count:
            lines.append(f"mean      {self._before / count:.4f} → {self._after / count:.4f}")
        return lines + [
            f"  sample {change['sample']} (rollout {change['rollout']}): {change['recorded']:g} → "
            f"{change['new']:g}   prompt {change['prompt']!r}   response {change['response']!r}"
            for change in self._changes
        ]


class GroupRewardReplayer(RewardReplayer):
    """Scores group by group; counts samples."""

    unit = "group"

    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        if record.evaluation and not ("eval_group_rm" in self.args and self.args.eval_group_rm):
            self.skip(_NO_GROUPS_IN_EVALUATION)
            return
        for number, group in enumerate(record.groups):
            yield Subject(number, record.rollout_id, record.evaluation, [group.samples])

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Those with a hook of their own are scored before the group is.
        samples = flatten(subject.groups)
        return (self.args, [copy.copy(s) if s.custom_rm_path is not None else _unscored(s) for s in samples]), {}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        samples = flatten(subject.groups)
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list | tuple) or len(values) != len(samples):
            got = f"{len(values)} rewards" if isinstance(values, list | tuple) else type(values).__name__
            raise self.wrong(f"returned {got} for the {len(samples)} samples of group {samples[0].group_index}")
        return [self._checked(one, sample, subject.evaluation) for one, sample in zip(values, samples, strict=True)]

    def compare(self, subject: Subject, result: Any) -> None:
        changed = False
        for sample, value in zip(flatten(subject.groups), result, strict=True):
            if sample.custom_rm_path is not None:
                self.skip(_OWN_HOOK)
            elif self._compare_one(subject, sample, value):
                changed = True
        self.changed += changed

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "groups_changed": self.changed}

    def lines(self) -> list[str]:
        return [*super().lines(), f"groups    {self.changed} with a changed score"]


def _unscored(sample: Any) -> Sample:
    clean = copy.copy(sample)
    clean.reward = None
    return clean


def _last(prompt: Any) -> Any:
    """Return the last chat message's text, or the prompt itself."""
    return prompt[-1].get("content", "") if isinstance(prompt, list) and prompt else prompt
