"""Make the quickstart's prompts and model below data/.

A random Qwen3 of 0.3 M parameters with a character tokenizer, training and held-out prompts that share no digit
sequence, and a supervised warm-up by `miles train` on answers in random order: it teaches which characters to write and
when to stop, not to sort.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789sort> "
HELD_OUT = {2: 8, 3: 40, 4: 40, 5: 40}


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character, plus padding and end of text."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(folder: Path, seed: int, characters: str = CHARACTERS) -> None:
    """Write an untrained model directory as Hugging Face writes it."""
    tokenizer = make_tokenizer(characters)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True, dtype="float32",
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: Qwen3 with {sum(p.numel() for p in model.parameters()):,} parameters")


def digits(rng: random.Random, length: int) -> str:
    """Distinct digits in random order."""
    return "".join(rng.sample("0123456789", length))


def write_lines(file: Path, rows: list[tuple[str, str]]) -> None:
    """Write prompt and label as JSON lines."""
    file.write_text("".join(json.dumps({"prompt": f"sort {s}>", "label": label}) + "\n" for s, label in rows))
    print(f"{file}: {len(rows)} lines")


def warm_up(folder: Path, seed: int, steps: int = 150) -> None:
    """Train data/model on data/warmup.jsonl; the result is data/warm, where the run starts."""
    options = {
        "loss-type": "sft_loss", "hf-checkpoint": folder / "model", "prompt-data": folder / "warmup.jsonl",
        "eval-prompt-data": folder / "heldout.jsonl",
        "num-rollout": steps, "rollout-batch-size": 64, "n-samples-per-prompt": 1, "num-steps-per-rollout": 1,
        "lr": 3e-3, "lr-decay-style": "cosine", "lr-warmup-iters": 10, "adam-beta2": 0.98, "seed": seed,
        "run-dir": folder / "warmup-run", "save-hf": folder / "warm",
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run_file = Path(__file__).parent / "run.toml"
    command = [sys.executable, "-m", "miles_api.cli", "train", str(run_file), *flags, "--overwrite"]
    # Progress goes to stderr. What it prints besides, a plan and a report, is not the quickstart's.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{folder / 'warm'}: the model after a supervised warm-up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    held_out: set[str] = set()
    for length, count in HELD_OUT.items():
        while sum(len(sequence) == length for sequence in held_out) < count:
            held_out.add(digits(rng, length))

    def training(count: int) -> list[str]:
        drawn = [digits(rng, rng.randint(2, 5)) for _ in range(2 * count)]
        return [sequence for sequence in drawn if sequence not in held_out][:count]

    make_model(options.out / "model", options.seed)
    write_lines(options.out / "train.jsonl", [(s, "".join(sorted(s))) for s in training(4000)])
    write_lines(options.out / "heldout.jsonl", [(s, "".join(sorted(s))) for s in sorted(held_out)])
    write_lines(options.out / "warmup.jsonl", [(s, "".join(rng.sample(s, len(s)))) for s in training(9600)])
    if options.warm_up:
        warm_up(options.out, options.seed)


if __name__ == "__main__":
    main()
