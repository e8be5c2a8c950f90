"""What a session's conversations become: one sample for each leaf of its tree.

A generated span that several samples share is trained in one of them: the last, by the order of requests. What an agent
asks later replaces what it asked before (a retry, a shortened history), so the last conversation is the one that the
span led to. In the others it is masked, with its log-probs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_rollout.generate.turn import one_conversation, sibling

if TYPE_CHECKING:
    from miles_api.sample import Sample
    from miles_rollout.generate.turn_tree import Turn

__all__ = ["fill_samples", "reward_samples"]

# What each sample that holds an answer takes from it; the engine's counts belong to the one that trains it.
_SHARED_META = frozenset(
    {"changed_tokens_by", "completion_tokens", "engine", "finish_reason", "weight_version", "weight_versions"}
)
_REWARD, _REWARDS = "reward", "rewards"


def fill_samples(sample: Sample, leaves: list[Turn], tokenizer: Any, *, skip_special: bool) -> list[Sample]:
    """Return one sample for each of `leaves`, in order, the first of them `sample` itself.

    They share group, index and rollout id, and the reward hook scores the last for all of them. Where there are
    several, `branch` and `branches` in the metadata say which of how many each is.
    """
    samples = [sample, *(sibling(sample, []) for _ in leaves[1:])]
    trained: set[Turn] = set()
    for own, leaf in zip(reversed(samples), reversed(leaves), strict=True):
        path = leaf.path()
        own.tokens = list(path[0].shown)
        for turn in path:
            if turn.parent is not None and turn.shown:
                text = tokenizer.decode(turn.shown, skip_special_tokens=skip_special)
                own.append_response_tokens(turn.shown, text=text, trainable=False)
            _append(own, turn, trainable=turn not in trained)
        trained.update(path)
        own.status = leaf.cut or own.status
    for number, (own, leaf) in enumerate(zip(samples, leaves, strict=True)):
        own.metadata = {**own.metadata, **_counts(leaf)}
        if len(leaves) > 1:
            own.metadata |= {"branch": number, "branches": len(leaves)}
    return one_conversation(samples)


def _append(sample: Sample, turn: Turn, *, trainable: bool) -> None:
    answer = turn.answer
    if answer is None:
        return
    sample.append_response_tokens(answer.ids, log_probs=answer.log_probs, text=answer.text, trainable=trainable)
    meta = answer.meta
    sample.update_from_meta_info(meta if trainable else {key: meta[key] for key in _SHARED_META & meta.keys()})


def _counts(leaf: Turn) -> dict[str, int]:
    path = leaf.path()
    rewritten = sum(len(turn.rewritten) for turn in path)
    return {"turns": len(path), **({"rewritten_messages": rewritten} if rewritten else {})}


def reward_samples(samples: list[Sample], leaves: list[Turn], given: dict[str, Any], who: str) -> dict[str, Any]:
    """Set the rewards that an agent gives, and return what of its result is for the metadata.

    `reward` is that of all samples. `rewards` is a mapping by the ids of completions: a sample gets what stands there
    for the last of its answers that is named, and `reward` without one. Raises `HookResultError` for an id that is none
    of this session's.
    """
    whole, named = given.get(_REWARD), given.get(_REWARDS) or {}
    if not isinstance(named, dict):
        raise HookResultError(f"{who} returned {named!r:.80} as {_REWARDS!r}, not a mapping by the ids of completions")
    paths = [leaf.path() for leaf in leaves]
    unknown = set(named).difference(*(turn.names for path in paths for turn in path))
    if unknown:
        raise HookResultError(f"{who} returned rewards for {sorted(map(str, unknown))}: no answers of this session")
    for sample, path in zip(samples, paths, strict=True):
        names = [name for turn in reversed(path) for name in turn.names if name in named]
        reward = named[names[0]] if names else whole
        sample.reward = sample.reward if reward is None else reward
    return {key: value for key, value in given.items() if key != _REWARDS}
