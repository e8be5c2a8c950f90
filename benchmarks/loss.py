"""Response log-probs, entropies and whole training steps: milliseconds, and memory at the peak.

`python benchmarks/loss.py` compares forward and backward of our log-probs, from the logits of all tokens (what a loss
hook gets) and of response tokens alone (what the trainer computes), with plain torch on the same packed logits.
`--steps` compares the passes of a trainer over a Llama with the 135 M model's vocabulary and widths, and fewer layers,
with logits of all tokens and of response tokens. Process time, one thread; the contestants take turns, best of several.
Megabytes are the most that torch allocates at once beyond what was there before, by its profiler, and in the first
comparison the logits.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from miles_train.log_probs import log_probs_and_entropy, packed_log_probs_and_entropy, response_rows
from miles_train.megatron import forward, init
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# samples, prompt tokens, response tokens, vocabulary
_SIZES = {
    "quickstart": (128, 10, 6, 32),
    "long": (8, 64, 448, 8192),
    "wide": (16, 16, 48, 49152),
    "widest": (4, 64, 192, 151936),
}
# samples, prompt tokens, response tokens
_STEPS = {"short-prompts": (8, 32, 224), "even": (8, 128, 128), "long-prompts": (8, 224, 32)}
_LLAMA = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
          "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip


def plain_torch(logits: Tensor, tokens: list[Tensor], lengths: list[int], temperature: float, entropy: bool) -> Tensor:
    """Do what most trainers do: slice each sample's rows, then log-softmax."""
    total, start = logits.new_zeros(()), 0
    for sequence, length in zip(tokens, lengths, strict=True):
        end = start + len(sequence)
        rows = torch.log_softmax(logits[end - length - 1 : end - 1].float() / temperature, -1)
        total = total + rows.gather(-1, sequence[-length:, None]).sum()
        if entropy:
            total = total - (rows.exp() * rows).sum()
        start = end
    return total


def ours(
    logits: Tensor, tokens: list[Tensor], lengths: list[int], temperature: float, entropy: bool, rows: Any = "all"
) -> Tensor:
    """Do the same through miles_train."""
    log_probs, entropies = log_probs_and_entropy(
        logits, tokens, lengths, temperature, entropy=entropy, chunk_size=1024, rows=rows
    )
    total = torch.cat(log_probs).sum()
    return total if entropies is None else total + torch.cat(entropies).sum()


def measured(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return each run's best milliseconds of process time, and the megabytes that it allocates at its peak."""
    peaks = {name: peak(run) for name, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return {name: (best[name], peaks[name]) for name in runs}


def peak(run: Callable[[], None]) -> float:
    """Return the most megabytes that are allocated at once in a run, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def log_probs(name: str, entropy: bool, temperature: float, repeats: int) -> None:
    """Measure log-probs of one size and print a line."""
    samples, prompt, response, vocab = _SIZES[name]
    tokens = [torch.randint(vocab, (prompt + response,)) for _ in range(samples)]
    lengths = [response] * samples
    logits = torch.randn(samples * (prompt + response), vocab)
    some = logits[response_rows(tokens, lengths)].clone()

    def run(function: Callable[..., Tensor], given: Tensor, **keywords: Any) -> None:
        leaf = given.detach().requires_grad_()
        function(leaf, tokens, lengths, temperature, entropy, **keywords).backward()

    runs = {
        "plain torch": lambda: run(plain_torch, logits),
        "ours, all rows": lambda: run(ours, logits),
        "ours, response rows": lambda: run(ours, some, rows="response"),
    }
    sizes = [logits.nbytes, logits.nbytes, some.nbytes]
    report(f"{name}{' + entropy' if entropy else ''}, T = {temperature}", measured(runs, repeats), sizes)


def steps(name: str, layers: int, repeats: int) -> None:
    """Measure the passes of one size and print two lines."""
    samples, prompt, response = _STEPS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(LlamaConfig(**_LLAMA, num_hidden_layers=layers)).save_pretrained(directory)
        model = build_model(directory, ParallelOptions())
    optimizer = build_optimizer(model, OptimizerOptions(), ParallelOptions(), total_steps=1000)
    tokens = [torch.randint(_LLAMA["vocab_size"], (prompt + response,)) for _ in range(samples)]
    lengths = [response] * samples

    def run(rows: Any, forward_only: bool) -> None:
        def loss_step(logits: Tensor, _batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            found, _ = packed_log_probs_and_entropy(logits, tokens, lengths, 1.0, chunk_size=1024, rows=rows)
            return -found.mean(), {}

        batch = {"tokens": tokens, "response_lengths": lengths}
        forward.run(model, [batch], loss_step, forward_only=forward_only, rows=rows)
        if not forward_only:
            optimizer.step()

    for kind, forward_only in (("old log-probs", True), ("step", False)):
        runs = {f"{rows} rows": partial(run, rows, forward_only) for rows in ("all", "response")}
        label = f"{kind}, {samples} × {prompt} + {response} tokens, {layers} layers"
        report(label, measured(runs, repeats), [0, 0])


def report(label: str, found: dict[str, tuple[float, float]], sizes: list[int]) -> None:
    """Print a line; `sizes` are the bytes to be added to what was measured."""
    first, columns = next(iter(found.values()))[0], []
    for (name, (milliseconds, grown)), size in zip(found.items(), sizes, strict=True):
        share = f"{milliseconds / first:4.2f} of it, " if columns else ""
        columns.append(f"{name} {milliseconds:.1f} ms, {share}{grown + size / 2**20:.0f} MB")
    print(f"{label}: {'; '.join(columns)}", flush=True)


def main() -> None:
    """Run every size, or the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", action="store_true", help="training steps instead of log-probs alone")
    parser.add_argument("--layers", type=int, default=6, help="layers of the Llama; the 135 M model has 30")
    parser.add_argument("--only", action="append", choices=[*_SIZES, *_STEPS], help="only this size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.steps:
        for name in args.only or _SIZES:
            for entropy, temperature in ((False, 1.0), (True, 1.0), (True, 0.7)):
                log_probs(name, entropy, temperature, args.repeats)
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    init.initialize(ParallelOptions(), rank=0, world_size=1, master_addr="127.0.0.1", master_port=port, seed=0)
    for name in args.only or _STEPS:
        steps(name, args.layers, args.repeats)
    init.shutdown()


if __name__ == "__main__":
    main()
