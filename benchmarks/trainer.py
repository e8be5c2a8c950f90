"""Trainer step on a CPU: forward, backward and AdamW against a plain transformers script with padded batches, and with
`--trl-python` a whole policy step against TRL's GRPOTrainer, generation excluded.

Prints tokens per second of process time for both sides, and their ratio. The two take turns step by step and the ratio
is that of the medians, so that other work on the machine hits both alike. For TRL: `hatch env create bench`, then
`hatch run python benchmarks/trainer.py --trl-python "$(hatch env find bench)/bin/python"`.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api.parsing.parse import parse_run
from miles_train.megatron import forward, init
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions
from miles_train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODELS = {
    "0.3M": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 30},
    "11M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096},
    "10M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192},
    "52M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9,
            "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 16384},
}  # fmt: skip
# model, sequences, shortest and longest
CASES = {"ragged-small": ("0.3M", 128, 13, 21), "even-small": ("0.3M", 128, 17, 17),
         "ragged-large": ("11M", 32, 64, 192), "even-large": ("11M", 32, 128, 128)}  # fmt: skip
# model, prompts of GROUP samples, seconds: prompts of 8 to 32 tokens, responses of 50 in the mean, a few very long
POLICY_CASES = {"policy-10M": ("10M", 4, 20.0), "policy-52M": ("52M", 2, 25.0)}
GROUP, LONGEST, TRL_MICRO_BATCH = 8, 256, 8
"""TRL's micro-batch is its default per_device_train_batch_size; ours is the default --max-tokens-per-gpu."""
KEEP = "def keep(args, rollout_id, rollout_data): pass\n"
"""A hook that may read old log-probs, so that a pass computes all of them first, as TRL's does."""


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="process time to spend on each case")
    parser.add_argument("--case", action="append", choices=[*CASES, *POLICY_CASES], help="only this case")
    parser.add_argument("--trl-python", help="an interpreter with TRL; left out, its cases are too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    init.initialize(ParallelOptions(), **alone(), seed=0)
    for case in [case for case in args.case or CASES if case in CASES]:
        run_case(case, args.seconds)
    init.shutdown()
    if args.trl_python:
        print("| policy step | ours, tok/s | TRL, tok/s | time, ours ÷ TRL | gradient norm, ours and TRL |")
        print("|---|---|---|---|---|")
        for case in [case for case in args.case or POLICY_CASES if case in POLICY_CASES]:
            run_policy_case(case, args.trl_python)


def alone() -> dict[str, Any]:
    """Return the place of the only rank."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return {"rank": 0, "world_size": 1, "master_addr": "127.0.0.1", "master_port": probe.getsockname()[1]}


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


def run_policy_case(case: str, python: str) -> None:
    """Measure a policy step without and with a pass for old log-probs; print a row for each."""
    name, prompts, seconds = POLICY_CASES[case]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        Qwen3ForCausalLM(Qwen3Config(**MODELS[name], tie_word_embeddings=True)).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)
        samples = make_samples(prompts, MODELS[name]["vocab_size"])
        (folder / "samples.json").write_text(json.dumps(samples))
        (folder / "keep.py").write_text(KEEP)
        tokens = sum(map(len, samples["prompt"] + samples["completion"]))
        slots = len(samples["prompt"]) * sum(max(map(len, samples[part])) for part in ("prompt", "completion"))
        with trl_steps(python, folder) as trl:
            for old in ("off", "on"):
                with policy_steps(folder, samples, old) as ours:
                    times, norms = turns({"ours": ours, "TRL": lambda old=old: trl(old)}, seconds)
                rates = " | ".join(f"{tokens / times[side]:,.0f}" for side in ("ours", "TRL"))
                title = f"{name}, {prompts * GROUP} samples, {tokens:,} tokens ({slots:,} padded), old log-probs {old}"
                ratio = times["ours"] / times["TRL"]
                print(f"| {title} | {rates} | {ratio:.2f} | {norms['ours']:.5f}, {norms['TRL']:.5f} |", flush=True)


def turns(
    sides: dict[str, Callable[[], dict[str, float]]], seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of a step and the first gradient norm of each side, after one step of warm-up."""
    norms = {side: step()["norm"] for side, step in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    while sum(map(sum, times.values())) < seconds or len(times["ours"]) < 2:  # noqa: PLR2004  one may be disturbed
        for side, step in sides.items():
            times[side].append(step()["seconds"])
    return {side: statistics.median(spent) for side, spent in times.items()}, norms


def make_samples(prompts: int, vocabulary: int) -> dict[str, list]:
    """Return prompts and completions of random tokens, with the long tail that sampled responses have."""
    draw = random.Random(0)
    samples: dict[str, list] = {"prompt": [], "completion": [], "advantages": []}
    for _ in range(prompts):
        prompt = [draw.randrange(1, vocabulary) for _ in range(draw.randint(8, 32))]
        for member in range(GROUP):
            length = min(LONGEST, max(4, round(draw.lognormvariate(3.6, 0.9))))
            samples["prompt"].append(prompt)
            samples["completion"].append([draw.randrange(1, vocabulary) for _ in range(length)])
            samples["advantages"].append(1.0 if member % 2 else -1.0)
    return samples


@contextmanager
def policy_steps(folder: Path, samples: dict[str, list], old: str) -> Iterator[Callable[[], dict[str, float]]]:
    """Start this repository's trainer; give a function that trains the samples once, as columns of a rollout."""
    size = len(samples["prompt"])
    flags = ["--hf-checkpoint", folder, "--num-rollout", 1000, "--rollout-batch-size", size // GROUP,
             "--n-samples-per-prompt", GROUP, "--num-steps-per-rollout", 1, "--global-batch-size", size, "--lr", 1e-9,
             *(["--rollout-data-postprocess-path", f"{folder}/keep.py:keep"] if old == "on" else [])]  # fmt: skip
    responses = [len(completion) for completion in samples["completion"]]
    batch = {
        "tokens": [a + b for a, b in zip(samples["prompt"], samples["completion"], strict=True)],
        "response_lengths": responses,
        "loss_masks": [[1] * n for n in responses],
        "rewards": samples["advantages"],
        "group_indices": [i // GROUP for i in range(size)],
    }
    trainer = Trainer(parse_run([str(flag) for flag in flags]), **alone())
    trainer.start()

    def step() -> dict[str, float]:
        start = time.process_time()
        report = trainer.train(0, batch)
        return {"seconds": time.process_time() - start, "norm": report.metrics["train/grad_norm"]}

    try:
        yield step
    finally:
        trainer.stop()


@contextmanager
def trl_steps(python: str, folder: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """Start TRL beside this process; give a function that takes one step there while this process waits."""
    words = [python, Path(__file__).with_name("trl_step.py"), folder, str(TRL_MICRO_BATCH)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def step(old: str) -> dict[str, float]:
            print(old, file=process.stdin, flush=True)
            while line := process.stdout.readline():
                if line.startswith("{"):
                    return json.loads(line)
            sys.exit("TRL's side has ended")

        yield step
        process.stdin.close()


if __name__ == "__main__":
    main()
