"""Trainer step (forward, backward, AdamW) against a plain transformers script with padded batches, on a CPU.

Prints tokens per second of both and their ratio, per model. The two take turns, and the ratio is that of the medians,
so that other work on the machine hits both.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from miles_train.megatron import forward, init
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

MODELS = {
    "0.3M": dict(vocab_size=30, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32),
    "11M": dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
                num_key_value_heads=2, head_dim=64),
}  # fmt: skip
CASES = {"ragged 128×~17": ("0.3M", 128, 13, 21), "even 128×17": ("0.3M", 128, 17, 17),
         "even 32×128": ("11M", 32, 128, 128), "ragged 32×~128": ("11M", 32, 64, 192)}  # fmt: skip


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times each side is measured")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of one measurement")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this case")
    parser.add_argument("--profile", action="store_true", help="print where the trainer's time goes instead")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init.initialize(ParallelOptions(), rank=0, world_size=1, master_addr="127.0.0.1", master_port=port, seed=0)
    for case in args.case or CASES:
        run_case(case, args)
    init.shutdown()


def run_case(case: str, args: argparse.Namespace) -> None:
    """Measure one case and print a line."""
    name, batch, shortest, longest = CASES[case]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        Qwen3ForCausalLM(Qwen3Config(**MODELS[name], tie_word_embeddings=True)).save_pretrained(directory)
        vocab = MODELS[name]["vocab_size"]
        lengths = [shortest + i % (longest - shortest + 1) for i in range(batch)]
        sequences = [torch.randint(0, vocab, (length,)) for length in lengths]
        sides = {"miles": miles_step(directory, sequences), "transformers": plain_step(directory, sequences)}
    if args.profile:
        with torch.profiler.profile() as profile:
            seconds_per_step(sides["miles"], args.seconds)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
        return
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, step in sides.items():
            times[side].append(seconds_per_step(step, args.seconds))
    rate = {side: sum(lengths) / statistics.median(times[side]) for side in sides}
    print(f"{name} {case}: miles {rate['miles']:,.0f} tok/s, transformers {rate['transformers']:,.0f} tok/s, "
          f"ratio {rate['miles'] / rate['transformers']:.2f}", flush=True)  # fmt: skip


def seconds_per_step(step: Callable[[], Any], seconds: float) -> float:
    """Return the mean time of a step over about `seconds`, after one step of warm-up."""
    step()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return (time.perf_counter() - start) / count


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of (N, V) logits; targets of -100 are left out."""
    return F.cross_entropy(logits, targets, ignore_index=-100)


def miles_step(directory: str, sequences: list[Tensor]) -> Callable[[], Any]:
    """Return a step of this repository's trainer on one packed micro-batch."""
    model = build_model(directory, ParallelOptions())
    optimizer = build_optimizer(model, OptimizerOptions(lr=1e-5), ParallelOptions(), total_steps=1000)
    targets = torch.cat([F.pad(s[1:], (0, 1), value=-100) for s in sequences])
    micro_batch = {"tokens": sequences}

    def loss_step(logits: Tensor, _micro_batch: dict) -> tuple[Tensor, dict]:
        return token_loss(logits, targets), {}

    def step() -> None:
        forward.run(model, [micro_batch], loss_step, forward_only=False)
        optimizer.step()

    return step


def plain_step(directory: str, sequences: list[Tensor]) -> Callable[[], Any]:
    """Return a step of a plain script: transformers, right padding, clipping, torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence([F.pad(s[1:], (0, 1), value=-100) for s in sequences], True, -100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)

    def step() -> None:
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        token_loss(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
