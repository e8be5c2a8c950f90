"""Count what a rollout cost: `rollout/generated_tokens`, those of dropped groups included.

For `--rollout-all-samples-process-path …:count` and `--custom-rollout-log-function-path …:log` together.
"""

_tokens: list[int] = []


def count(args, all_samples, data_source):
    """Add up the response tokens of all groups that the rollout scored."""
    _tokens[:] = [sum(sample.response_length for group in all_samples for sample in group)]


def log(rollout_id, args, samples, metrics, seconds):
    """Report what `count` saw of this rollout."""
    metrics["rollout/generated_tokens"] = float(_tokens[0])
    return False
