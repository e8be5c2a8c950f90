"""What the stubs do not say of a hook: which ranks run it, what else it needs, what happens when it fails."""

from __future__ import annotations

from miles_api.hooks import REGISTRY

__all__ = ["BY_LOOP", "FAILURES", "FIRES", "MOMENTS", "NEEDS", "ONCE", "PROCESS", "RANKS"]

_LAST_STAGE = "every trainer rank of the last pipeline stage"
RANKS = {
    "rollout_data_postprocess": _LAST_STAGE, "advantage": _LAST_STAGE, "loss": _LAST_STAGE,
    "importance_weights": _LAST_STAGE, "pg_loss_reducer": _LAST_STAGE, "post_save": "trainer rank 0",
}  # fmt: skip
PROCESS = {"rollout": "the rollout process", "train": "every trainer rank", "router": "the router process"}
MOMENTS = {
    "start": "at the start", "rollout": "in the first rollout", "eval": "in the first evaluation",
    "save": "with the first checkpoint",
}  # fmt: skip

FIRES = {"before_log_prob": "on every rank, before each pass that only computes log-probs"}
"""Where the stub's own sentence needs the one before it."""

BY_LOOP = (
    "generate", "reward", "group_reward", "dynamic_filter", "all_samples_process", "agent", "agent_abort",
    "execute_tool", "tool_specs",
)  # fmt: skip
"""Hooks that the default rollout calls: a rollout hook of the user's own may, or not."""

NEEDS = {
    "eval_rollout": "`--eval-interval`",
    "eval_rollout_log": "`--eval-interval`",
    "group_reward": "`--group-rm`; in evaluation `--eval-group-rm`",
    "loss": "`--loss-type custom_loss`",
    "advantage": "a `--loss-type` with advantages: not `sft_loss`",
    "importance_weights": "`--use-tis` or `--get-mismatch-metrics`, and `--loss-type policy_loss`",
    "pg_loss_reducer": "`--loss-type policy_loss`",
    "before_log_prob": "a run that recomputes log-probs: several steps a rollout, and not `--use-rollout-logprobs`",
    "buffer_filter": "the default data source",
    "agent": "`--custom-generate-function-path agentic`",
    "agent_abort": "an agent, in whose module it is defined as `abort`",
    "execute_tool": "`--custom-generate-function-path multi_turn`, and tool specifications by "
    "`--generate-tool-specs-path` or `--tool-key`",
    "tool_specs": "`--custom-generate-function-path multi_turn` and `--generate-execute-tool-function-path`",
}
"""Beside its flag, what a run must have for the hook to be called."""

_SCORED = ("generate", "reward", "group_reward")
ONCE = (
    "all_samples_process", "sample_filter", "reward_post_process", "convert_samples", "rollout_log", "eval_rollout_log",
)  # fmt: skip
_REPEATED = "`--hook-retries` times; then its group starts over, once"
_DROPPED = "the group is dropped as `hook_error:HOOK` and spends `--hook-error-budget`; past it the run stops"
FAILURES: list[tuple[tuple[str, ...], str, str, str]] = [
    (
        _SCORED,
        "`--hook-timeout`, each call",
        _REPEATED,
        f"{_DROPPED}. In evaluation the sample is left out and counted, never scored 0",
    ),
    (("dynamic_filter",), "`--hook-timeout`, each call", _REPEATED, _DROPPED),
    (ONCE, "`--hook-timeout`", "no", "the run stops"),
    (("rollout", "eval_rollout"), "`--rollout-timeout` for the whole", "no", "the run stops"),
    (("data_source", "buffer_filter"), "none of their own", "no", "the run stops"),
    (
        ("agent", "execute_tool"),
        "that of the `generate` hook they are part of",
        "with the whole conversation, as `generate`",
        "as `generate`",
    ),
    (("agent_abort",), "none", "no", "it is said and counted; the rollout is over anyway"),
    (("tool_specs",), "none", "no", "a value that is no list of specifications stops the run"),
    (
        tuple(spec.name for spec in REGISTRY.values() if spec.side == "train"),
        "none a call (a rank alone would leave the others waiting); `--trainer-timeout` for all ranks together",
        "no",
        "the run stops; the error names rank, rollout and step",
    ),
    (
        ("router_middleware",),
        "none",
        "no",
        "the client gets a 500 that names the middleware; it is counted, the router lives on",
    ),
]
"""Hooks, deadline, repeated, at last."""
