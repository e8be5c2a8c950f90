"""Time response log-probs (and entropy), forward and backward, against plain torch on the same packed logits.

`python benchmarks/loss.py` prints milliseconds and the ratio; interleaved runs, best of several, one thread.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from miles_train.log_probs import log_probs_and_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# samples, prompt tokens, response tokens, vocabulary
_SIZES = {"quickstart": (128, 10, 6, 32), "long": (8, 64, 448, 8192), "wide": (16, 16, 48, 49152)}


def plain_torch(logits: Tensor, tokens: list[Tensor], lengths: list[int], entropy: bool) -> Tensor:
    """Do what most trainers do: slice each sample's rows, then log-softmax."""
    total, start = logits.new_zeros(()), 0
    for sequence, length in zip(tokens, lengths, strict=True):
        end = start + len(sequence)
        rows = torch.log_softmax(logits[end - length - 1 : end - 1].float(), -1)
        total = total + rows.gather(-1, sequence[-length:, None]).sum()
        if entropy:
            total = total - (rows.exp() * rows).sum()
        start = end
    return total


def ours(logits: Tensor, tokens: list[Tensor], lengths: list[int], entropy: bool) -> Tensor:
    """Do the same through miles_train."""
    log_probs, entropies = log_probs_and_entropy(logits, tokens, lengths, 1.0, entropy=entropy)
    total = torch.cat(log_probs).sum()
    return total if entropies is None else total + torch.cat(entropies).sum()


def best_of(functions: list[Callable[[], Tensor]], logits: Tensor, repeats: int) -> list[float]:
    """Return the best milliseconds of each function, forward and backward."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            logits.grad = None
            start = time.perf_counter()
            function().backward()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    """Run every size with and without entropy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for name, (samples, prompt, response, vocab) in _SIZES.items():
        tokens = [torch.randint(vocab, (prompt + response,)) for _ in range(samples)]
        lengths = [response] * samples
        logits = torch.randn(samples * (prompt + response), vocab, requires_grad=True)
        for entropy in (False, True):
            functions = [partial(function, logits, tokens, lengths, entropy) for function in (ours, plain_torch)]
            mine, plain = best_of(functions, logits, repeats)
            label = f"{name}{' + entropy' if entropy else ''}"
            print(f"{label:22} ours {mine:8.2f} ms   plain torch {plain:8.2f} ms   ratio {plain / mine:5.2f}")


if __name__ == "__main__":
    main()
