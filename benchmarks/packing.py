"""Packed sequences against padded ones on lengths with a long tail: forward and backward of the same Megatron model.

The padded side pads every sample to the longest of the step, as a plain batch does, in micro-batches of as many slots
as the packed side has tokens. Prints how much faster packing is, beside what the removed padding allows (padded slots
divided by real tokens; attention alone allows more, its work on padding is quadratic), and the padding that is left in
the packed side's attention. The two take turns, process time, ratio of medians, one thread.
"""

from __future__ import annotations

import argparse
import math
import random
import socket
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles_train.batching import pack_micro_batches
from miles_train.log_probs import packed_log_probs_and_entropy
from miles_train.megatron import forward, init
from miles_train.megatron.attention import count_slots
from miles_train.megatron.model import build_model
from miles_train.options import ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = {
    "10M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096},
    "38M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096},
}  # fmt: skip
# model, samples, median length, spread of the logarithm, tokens of a micro-batch
CASES = {"narrow": ("10M", 32, 32, 1.0, 1024), "wide": ("38M", 16, 32, 1.2, 1024),
         "long": ("10M", 10, 160, 1.3, 2048)}  # fmt: skip
_VOCAB = 4096


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side takes its turn")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this case")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    init.initialize(ParallelOptions(), rank=0, world_size=1, master_addr="127.0.0.1", master_port=port, seed=0)
    titles = ("max/median", "packed tok/s", "padded tok/s", "faster", "allowed", "reached", "attention padding")
    print(f"{'case':8}" + "".join(f"{title:>{len(title) + 2}}" for title in titles), flush=True)
    for case in args.case or CASES:
        run_case(case, args.rounds)
    init.shutdown()


def run_case(case: str, rounds: int) -> None:
    """Measure one case and print a line."""
    name, samples, median, spread, budget = CASES[case]
    torch.manual_seed(0)
    lengths = long_tail(samples, median, spread)
    sequences = [torch.randint(0, _VOCAB, (length,)) for length in lengths]
    with tempfile.TemporaryDirectory() as directory:
        Qwen3ForCausalLM(Qwen3Config(**MODELS[name], tie_word_embeddings=True)).save_pretrained(directory)
        model = build_model(directory, ParallelOptions())
    packs = pack_micro_batches(lengths, budget)
    sides = {
        "packed": step(model, [[sequences[i] for i in pack] for pack in packs], lengths=None),
        "padded": step(model, padded(sequences, budget), lengths=lengths),
    }
    times = times_of(sides, rounds)
    seconds = {side: statistics.median(taken) for side, taken in times.items()}
    faster, allowed = seconds["padded"] / seconds["packed"], samples * max(lengths) / sum(lengths)
    slots = sum(count_slots([lengths[i] for i in pack]) for pack in packs)
    print(
        f"{case:8}{max(lengths) / statistics.median(lengths):12.1f}{sum(lengths) / seconds['packed']:14,.0f}"
        f"{sum(lengths) / seconds['padded']:14,.0f}{faster:8.2f}{allowed:9.2f}{faster / allowed:9.0%}"
        f"{1 - sum(lengths) / slots:19.0%}",
        flush=True,
    )


def long_tail(samples: int, median: int, spread: float) -> list[int]:
    """Return the quantiles of a lognormal distribution, in a random order that is always the same."""
    normal = statistics.NormalDist(math.log(median), spread)
    lengths = [max(8, round(math.exp(normal.inv_cdf((i + 0.5) / samples)))) for i in range(samples)]
    random.Random(0).shuffle(lengths)
    return lengths


def padded(sequences: list[Tensor], budget: int) -> list[list[Tensor]]:
    """Return micro-batches of sequences that all have the length of the longest."""
    longest = max(map(len, sequences))
    rows = max(1, budget // longest)
    full = [functional.pad(sequence, (0, longest - len(sequence))) for sequence in sequences]
    return [full[i : i + rows] for i in range(0, len(full), rows)]


def step(model: list[Any], micro_batches: list[list[Tensor]], *, lengths: list[int] | None) -> Callable[[], None]:
    """Return forward and backward of the mean log-prob of all tokens after the first; `lengths` are those of samples
    that are padded."""
    real = iter(lengths or [])
    batches = []
    for tokens in micro_batches:
        weights = [(torch.arange(1, len(row)) < (next(real) if lengths else len(row))).float() for row in tokens]
        batches.append(
            {"tokens": tokens, "response_lengths": [len(row) - 1 for row in tokens], "weights": torch.cat(weights)}
        )

    def loss_step(logits: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict]:
        log_probs, _ = packed_log_probs_and_entropy(
            logits, batch["tokens"], batch["response_lengths"], 1.0, rows="response"
        )
        return -(log_probs * batch["weights"]).sum() / 1e4, {}

    def run() -> None:
        forward.run(model, batches, loss_step, forward_only=False, rows="response")

    return run


def times_of(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the process time of each step, the sides in turn, after one step of warm-up of the shorter side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    sides["packed"]()
    for _ in range(rounds):
        for side, one in sides.items():
            start = time.process_time()
            one()
            times[side].append(time.process_time() - start)
    return times


if __name__ == "__main__":
    main()
