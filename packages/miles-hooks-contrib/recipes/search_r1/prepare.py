"""Make the corpus, prompts and model of search_r1.toml below data/.

The corpus says of 256 animals which color and which food they like, at random: nobody can know it without looking it
up. A random Qwen3 of 0.3 M parameters gets a supervised warm-up by `miles train` on made-up turns that teach the form
and nothing else: four in ten begin with a search, for any two words of the question, and six with an answer, any color
or food; after a passage, the answer is either word that it says. No fact of the corpus is in it.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_hooks_contrib.search_r1.tags import CORRECTION, observation


def _words(text: str) -> list[str]:
    return text.split()


HERE = Path(__file__).parent
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
TOKENS = r"</?[a-z]+>| ?\w+|[^\w\s]|\s"
WHICH = _words("old young big small fast slow wild tame loud shy proud lazy brave calm sly kind")
ANIMALS = _words("cat dog fox owl cow hen pig rat bee ant elk emu bat ape yak eel")
LIKES = {
    "color": _words("red blue green white black brown pink gold gray teal"),
    "food": _words("corn rice bread milk beans nuts figs plums eggs fish"),
}
NAMES = [" ".join(pair) for pair in itertools.product(WHICH, ANIMALS)]
HELD_OUT, WARM_UP = 64, 19200
INITIAL = 0.1
"""Spread of the first weights: with the usual 0.02 it takes several times as long to learn to repeat a word."""
KINDS = {"answer": 0.3, "search": 0.2, "read": 0.5}
"""What the turns of the warm-up are: the first two begin a conversation, the third ends it."""


def prompt_of(name: str, asked: str) -> str:
    return f"The {asked} of {name}?"


def passage_of(name: str, likes: dict[str, str]) -> str:
    """Title, line break, text."""
    return f"the {name}\n" + " ".join(f"{asked} {word}" for asked, word in likes.items())


def any_likes(rng: random.Random) -> dict[str, str]:
    return {asked: rng.choice(words) for asked, words in LIKES.items()}


def warm_up_turn(rng: random.Random) -> tuple[str, str]:
    """A prompt and a turn of the right form, right by chance at most; words keep the space before them."""
    name, asked = rng.choice(NAMES), rng.choice(list(LIKES))
    prompt, [kind] = prompt_of(name, asked), rng.choices(list(KINDS), KINDS.values())
    if kind == "answer":
        return prompt, f"<think> know</think><answer> {rng.choice(list(any_likes(rng).values()))}</answer>"
    search = f"<think> look</think><search> {' '.join(rng.sample([asked, *name.split()], 2))}</search>"
    if kind == "search":
        return prompt, search
    likes = any_likes(rng)
    shown = observation([passage_of(rng.choice([name, rng.choice(NAMES)]), likes)])
    answer = f"<think> read</think><answer> {rng.choice(list(likes.values()))}</answer>"
    return f"{prompt}{search}\n\n<information>{shown}</information>\n\n", answer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a tag, a sign, and a word with the space before it."""
    words = " ".join([*WHICH, *ANIMALS, *itertools.chain(*LIKES.values()), *LIKES, "know look read"])
    said = [prompt_of("", ""), CORRECTION, observation(["the"]), f" {words}"]
    splitter = pre_tokenizers.Split(Regex(TOKENS), "isolated")
    tokens = {word for text in said for word, _ in splitter.pre_tokenize_str(text)} | {"\n", " "}
    tokens = ["<pad>", "<eos>", "<unk>", *TAGS, *sorted(tokens - set(TAGS))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model(folder: Path, seed: int) -> None:
    """Write an untrained model directory as Hugging Face writes it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=INITIAL, max_position_embeddings=256,
        tie_word_embeddings=True, dtype="float32", bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file}: {len(rows)} lines")


def warm_up(folder: Path, seed: int, steps: int) -> None:
    """Train data/model on data/warmup.jsonl; the result is data/warm, where the run starts."""
    options = {
        "loss-type": "sft_loss", "hf-checkpoint": folder / "model", "prompt-data": folder / "warmup.jsonl",
        "label-key": "label", "rollout-shuffle": True, "num-rollout": steps, "rollout-batch-size": 64,
        "n-samples-per-prompt": 1, "num-steps-per-rollout": 1, "lr": 3e-3, "lr-decay-style": "cosine",
        "lr-warmup-iters": 10, "adam-beta2": 0.98, "seed": seed, "run-dir": folder / "warmup-run",
        "save-hf": folder / "warm",
    }  # fmt: skip
    flags = [w for name, v in options.items() for w in ([f"--{name}"] if v is True else [f"--{name}", str(v)])]
    command = [sys.executable, "-m", "miles_api.cli", "train", *flags, "--overwrite"]
    # Progress goes to stderr. What it prints besides, a plan and a report, is not the recipe's.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{folder / 'warm'}: the model after a supervised warm-up")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=300, help="of the warm-up")
    given = parser.parse_args(words)
    rng = random.Random(given.seed)
    facts = {name: any_likes(rng) for name in NAMES}
    names = rng.sample(NAMES, len(NAMES))
    make_model(given.out / "model", given.seed)
    rows = [{"id": name, "contents": passage_of(name, likes)} for name, likes in facts.items()]
    write_lines(given.out / "corpus.jsonl", rows)
    for file, chosen in (("heldout", names[:HELD_OUT]), ("train", names[HELD_OUT:])):
        pairs = itertools.product(chosen, LIKES)
        rows = [{"prompt": prompt_of(*pair), "label": facts[pair[0]][pair[1]]} for pair in pairs]
        write_lines(given.out / f"{file}.jsonl", rows)
    turns = [warm_up_turn(rng) for _ in range(WARM_UP)]
    write_lines(given.out / "warmup.jsonl", [{"prompt": prompt, "label": said} for prompt, said in turns])
    if given.warm_up:
        warm_up(given.out, given.seed, given.steps)


if __name__ == "__main__":
    main()
