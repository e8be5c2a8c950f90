"""Which hooks this package calls, and who calls them: each resolves its own, once in the process."""

__all__ = ["CALLED", "CALLED_BY_LOOP", "CALLED_BY_SERVICE"]

CALLED_BY_SERVICE = (
    "rollout", "eval_rollout", "data_source", "sample_filter", "reward_post_process", "convert_samples", "rollout_log",
    "eval_rollout_log",
)  # fmt: skip
"""Called whatever the rollout hook is."""

CALLED_BY_LOOP = (
    "generate", "reward", "group_reward", "dynamic_filter", "all_samples_process", "agent", "agent_abort",
    "execute_tool", "tool_specs",
)  # fmt: skip
"""Called by the default rollout: a rollout hook of your own calls what it likes."""

CALLED = (*CALLED_BY_SERVICE, *CALLED_BY_LOOP, "buffer_filter")
"""Every hook that runs in the rollout process; the default data source calls the buffer filter."""
