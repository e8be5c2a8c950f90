"""Report how often one of k answers to a prompt is right: the unbiased estimate of pass@k from each group."""

import math
from collections import defaultdict

K = 4


def log_pass_at_k(rollout_id, args, samples, metrics, seconds):
    """Add `rollout/pass_at_4` to a rollout's metrics."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.group_index].append(sample.reward >= 1.0)
    found = [1 - math.comb(right.count(False), K) / math.comb(len(right), K) for right in groups.values()]
    metrics[f"rollout/pass_at_{K}"] = sum(found) / len(found)
    return False
