"""A coin decides whether an answer is right, and is not trained; what can be learned is how long to go on after it.

With advantages centred in each group nothing rewards length: it moves by the loss's own bias, and by chance.
"""


def heads(args, sample):
    """Score the first letter of an answer."""
    return 1.0 if sample.response.startswith("s") else 0.0


def leave_coin_alone(args, rollout_id, rollout_data):
    """Take the first token of each answer out of the loss."""
    for mask in rollout_data["loss_masks"]:
        mask[:1] = 0


def log_lengths(rollout_id, args, samples, metrics, seconds):
    """Add `rollout/length_right` and `rollout/length_wrong`: mean tokens of either kind of answer."""
    for name, reward in (("right", 1.0), ("wrong", 0.0)):
        lengths = [sample.response_length for sample in samples if sample.reward == reward]
        if lengths:
            metrics[f"rollout/length_{name}"] = sum(lengths) / len(lengths)
    return False
