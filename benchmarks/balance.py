"""How evenly samples are spread over data-parallel ranks, and what working that out costs.

Prints by how much the busiest rank exceeds the lower bound, max(mean, costliest sample): samples in turn
(--no-balance-data), as miles spreads them (costliest first to the rank with the least), and by Karmarkar and Karp's
differencing, the better and slower method; means over several draws, with milliseconds for one. Lengths have a long
tail: lognormal, or many short and some cut off at the limit. Costs are tokens, or operations of a 1.5 B model.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
import time
from typing import TYPE_CHECKING

from miles_train.batching import spread
from miles_train.megatron.hf_config import HFConfig
from miles_train.work import sample_flops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODEL = HFConfig(
    architecture="Qwen2ForCausalLM", num_layers=28, hidden_size=1536, ffn_hidden_size=8960, num_heads=12,
    num_kv_heads=2, head_dim=128, vocab_size=151936, max_positions=32768, rms_norm_eps=1e-6, rope_theta=1e6,
    tied=True, qk_norm=False, qkv_bias=True,
)  # fmt: skip
_PROMPT, _LIMIT, _CUT_OFF = 128, 4096, 0.25


def main() -> None:
    """Print one line for each distribution, cost, number of ranks and samples in a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5)
    draws = parser.parse_args().draws
    methods: dict[str, Callable[[Sequence[float], int], list[list[int]]]] = {
        "in turn": in_turn, "miles": spread, "differencing": differencing,
    }  # fmt: skip
    print(f"{'lengths':10}{'cost':8}{'ranks':>6}{'samples':>8}" + "".join(f"{name:>22}" for name in methods))
    for kind in ("lognormal", "cut off"):
        for unit in ("tokens", "flops"):
            for ranks in (2, 8, 32, 64):
                for samples in (64, 256, 1024, 4096):
                    if samples > ranks:
                        row = compare(list(methods.values()), kind, unit, ranks, samples, draws)
                        print(f"{kind:10}{unit:8}{ranks:6}{samples:8}" + "".join(row), flush=True)


def compare(
    methods: list[Callable[[Sequence[float], int], list[list[int]]]],
    kind: str,
    unit: str,
    ranks: int,
    samples: int,
    draws: int,
) -> list[str]:
    """Return for each method how far it is from the lower bound, and its time, as text."""
    excess: list[list[float]] = [[] for _ in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    for draw in range(draws):
        costs = draw_costs(random.Random(draw), kind, unit, samples)
        bound = max(sum(costs) / ranks, *costs)
        for method, of_bound, taken in zip(methods, excess, seconds, strict=True):
            start = time.perf_counter()
            shares = method(costs, ranks)
            taken.append(time.perf_counter() - start)
            of_bound.append(max(sum(costs[i] for i in share) for share in shares) / bound - 1)
    return [
        f"{statistics.mean(of_bound):11.2%} {1e3 * statistics.median(taken):7.2f} ms"
        for of_bound, taken in zip(excess, seconds, strict=True)
    ]


def draw_costs(generator: random.Random, kind: str, unit: str, samples: int) -> list[int]:
    """Return what the samples of a step cost."""
    if kind == "lognormal":
        responses = [
            min(2 * _LIMIT, max(16, int(generator.lognormvariate(math.log(600), 0.9)))) for _ in range(samples)
        ]
    else:
        responses = [_LIMIT if generator.random() < _CUT_OFF else generator.randint(20, 400) for _ in range(samples)]
    lengths = [_PROMPT + response for response in responses]
    return lengths if unit == "tokens" else sample_flops(lengths, responses, MODEL)


def in_turn(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Give the ranks the samples one after another."""
    return [list(range(rank, len(costs), ranks)) for rank in range(ranks)]


def differencing(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Join the two most uneven partitions, the heaviest part of one with the lightest of the other, until one is left
    (Karmarkar and Karp 1982)."""
    empty: list[tuple[float, list[int]]] = [(0, []) for _ in range(ranks - 1)]
    heap = [(-cost, position, [(cost, [position]), *empty]) for position, cost in enumerate(costs)]
    heapq.heapify(heap)
    for number in range(len(costs), 2 * len(costs) - 1):
        (_, _, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, mine + theirs) for (a, mine), (b, theirs) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [share for _, share in heap[0][2]]


if __name__ == "__main__":
    main()
