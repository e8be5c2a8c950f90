"""Built-in rewards, `--rm-type NAME`: one file a kind."""

from miles_rollout.rewards.dispatch import KINDS, grade, reward

__all__ = ["KINDS", "grade", "reward"]
