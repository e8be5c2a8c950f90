"""Trainer step (forward, backward, AdamW) against a plain transformers script with padded batches, on a CPU.

Prints tokens per second of process time for both, and their ratio. The two take turns step by step and the ratio is
that of the medians, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from miles_train.megatron import forward, init
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = {
    "0.3M": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 30},
    "11M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096},
}  # fmt: skip
# model, sequences, shortest and longest
CASES = {"ragged-small": ("0.3M", 128, 13, 21), "even-small": ("0.3M", 128, 17, 17),
         "ragged-large": ("11M", 32, 64, 192), "even-large": ("11M", 32, 128, 128)}  # fmt: skip


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="process time to spend on each case")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this case")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    init.initialize(ParallelOptions(), rank=0, world_size=1, master_addr="127.0.0.1", master_port=port, seed=0)
    for case in args.case or CASES:
        run_case(case, args.seconds)
    init.shutdown()


def run_case(case: str, seconds: float) -> None:
    """Measure one case and print a line."""
    name, batch, shortest, longest = CASES[case]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        Qwen3ForCausalLM(Qwen3Config(**MODELS[name], tie_word_embeddings=True)).save_pretrained(directory)
        vocab = MODELS[name]["vocab_size"]
        lengths = [shortest + i % (longest - shortest + 1) for i in range(batch)]
        sequences = [torch.randint(0, vocab, (length,)) for length in lengths]
        sides = {"miles": miles_step(directory, sequences), "transformers": plain_step(directory, sequences)}
    rate = {side: sum(lengths) / statistics.median(times) for side, times in times_of(sides, seconds).items()}
    ratio = rate["miles"] / rate["transformers"]
    speeds = ", ".join(f"{side} {speed:,.0f} tok/s" for side, speed in rate.items())
    print(f"{case} ({name}, {batch} × {shortest}..{longest}): {speeds}, ratio {ratio:.2f}", flush=True)


def times_of(sides: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Return the process time of each step, the sides in turn, after one step of warm-up for each."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for step in sides.values():
        step()
    while sum(map(sum, times.values())) < seconds:
        for side, step in sides.items():
            start = time.process_time()
            step()
            times[side].append(time.process_time() - start)
    return times


def miles_step(directory: str, sequences: list[Tensor]) -> Callable[[], None]:
    """Return a step of this repository's trainer on one packed micro-batch."""
    model = build_model(directory, ParallelOptions())
    optimizer = build_optimizer(model, OptimizerOptions(lr=1e-5), ParallelOptions(), total_steps=1000)
    targets = torch.cat([functional.pad(s[1:], (0, 1), value=-100) for s in sequences])
    micro_batch = {"tokens": sequences}

    def loss_step(logits: Tensor, _micro_batch: dict) -> tuple[Tensor, dict]:
        return functional.cross_entropy(logits, targets), {}

    def step() -> None:
        forward.run(model, [micro_batch], loss_step, forward_only=False)
        optimizer.step()

    return step


def plain_step(directory: str, sequences: list[Tensor]) -> Callable[[], None]:
    """Return a step of a plain script: transformers, right padding, clipping, torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = pad_sequence(sequences, batch_first=True)
    targets = pad_sequence([functional.pad(s[1:], (0, 1), value=-100) for s in sequences], True, -100)
    mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)

    def step() -> None:
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
