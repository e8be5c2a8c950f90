"""The prompts: topics times pairs of instructions that reward.py verifies; held-out prompts are about other topics."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

__all__ = ["INSTRUCTIONS", "write_prompts"]

_WORDS = """apples art bears bees bicycles birds boats books bread bridges butter cats cheese chess clocks clouds coffee
cooking dancing deserts dogs doors dreams eggs farming fire fishing flowers forests gardens gold hats history honey
horses ice islands jazz kites lakes lamps libraries maps markets milk mirrors money mountains museums music night oceans
painting paper pianos poetry rain rivers roads robots rockets salt schools sheep ships shoes silk sleep snow soap
spiders spring stars stones storms sugar summer swimming tea teachers theatre tigers toys trains trees tunnels villages
violins walls water whales wheels wind windows winter wolves wood wool"""
TOPICS = _WORDS.split()
HELD_OUT = 8
"""How many topics are held out."""
INSTRUCTIONS: dict[str, tuple[str, list[Any]]] = {
    # name of the check in reward.py: how it is put, and the values it is asked with
    "no_commas": ("Do not use any commas.", [True]),
    "max_words": ("Use at most {} words.", [10, 12]),
    "includes": ('Use the word "{}".', ["friend", "happy", "morning", "old", "small"]),
    "ends_with": ("Write it as a question: end with {}", ["?"]),
}


def make_lines(topics: list[str], rng: random.Random) -> list[str]:
    """Return a JSON line for each topic and each pair of instructions, in random order."""
    lines = []
    for topic, kinds in itertools.product(topics, itertools.combinations(INSTRUCTIONS, 2)):
        checks = {kind: rng.choice(INSTRUCTIONS[kind][1]) for kind in kinds}
        asked = " ".join(INSTRUCTIONS[kind][0].format(value) for kind, value in checks.items())
        metadata = {"topic": topic, "checks": checks}
        # An empty system message: the template would put one of 20 tokens in its place.
        text = f"Write one short sentence about {topic}. {asked}"
        prompt = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
        lines.append(json.dumps({"prompt": prompt, "metadata": metadata}) + "\n")
    rng.shuffle(lines)
    return lines


def write_prompts(folder: Path, seed: int) -> None:
    """Write train.jsonl and heldout.jsonl, about different topics."""
    rng = random.Random(seed)
    topics = rng.sample(TOPICS, len(TOPICS))
    for name, chosen in (("train", topics[HELD_OUT:]), ("heldout", topics[:HELD_OUT])):
        lines = make_lines(chosen, rng)
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{folder / name}.jsonl: {len(lines)} prompts")
