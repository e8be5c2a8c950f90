"""Which hooks this package calls, and who calls them."""

__all__ = ["CALLED", "CALLED_BY_LOOP"]

CALLED_BY_LOOP = ("generate", "reward", "group_reward", "dynamic_filter", "all_samples_process")
"""Called by the default rollout: a rollout hook of your own calls what it likes."""

CALLED = (
    "rollout", "eval_rollout", "data_source", "buffer_filter", "sample_filter", "reward_post_process",
    "convert_samples", "rollout_log", "eval_rollout_log", *CALLED_BY_LOOP,
)  # fmt: skip
"""Every hook that runs in the rollout process."""
