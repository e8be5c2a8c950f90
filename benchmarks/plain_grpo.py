"""The quickstart's job as a plain transformers script: no router, no HTTP, no Ray, no Megatron: the floor.

Same warmed model, prompts, reward, batch arithmetic, optimizer and clipping; like the quickstart it reuses the
generation's log-probs and leaves samples without advantage out of the forward pass. One line of JSON a rollout.
"""

import json
import random
import time
from pathlib import Path

import contest
import torch
from contest import CLIP_HIGH, CLIP_LOW, GROUP, LEARNING_RATE, NEW_TOKENS, PROMPTS, STEPS
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_rows(file: Path) -> list[dict[str, str]]:
    """Read the prompt file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    return rows


def generate(model, tokenizer, rows):
    """Sample GROUP answers to each prompt; return ids, prompt width, mask and log-probs of the answers."""
    texts = [row["prompt"] for row in rows for _ in range(GROUP)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=NEW_TOKENS,
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        width = batch["input_ids"].shape[1]
        answers = out.sequences[:, width:]
        log_probs = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    ended = (answers == tokenizer.eos_token_id).cumsum(1)
    mask = ((ended == 0) | ((ended == 1) & (answers == tokenizer.eos_token_id))).float()
    return out.sequences.clone(), batch["attention_mask"], mask, log_probs.clone()


def advantages_of(rewards: torch.Tensor) -> torch.Tensor:
    """Centre and scale within each group."""
    groups = rewards.view(-1, GROUP)
    spread = groups.std(dim=1, keepdim=True)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (spread + 1e-6) * (spread > 0)).flatten()


def train(model, optimizer, sequences, prompt_mask, mask, old, advantages):
    """Two clipped steps over the samples that have an advantage."""
    width = prompt_mask.shape[1]
    for part in torch.arange(len(sequences)).chunk(STEPS):
        rows = part[advantages[part] != 0]
        if not len(rows):
            continue
        attention = torch.cat([prompt_mask[rows], mask[rows].long()], 1)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(sequences[rows], attention_mask=attention, position_ids=positions).logits[:, width - 1 : -1]
        log_probs = logits.float().log_softmax(-1).gather(-1, sequences[rows, width:, None]).squeeze(-1)
        ratio = (log_probs - old[rows]).exp()
        gain = advantages[rows, None]
        loss = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * gain)
        loss = ((loss * mask[rows]).sum(1) / mask[rows].sum(1)).sum() / len(part)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def one_rollout(model, tokenizer, optimizer, rows):
    """Generate, score and train; return when it ended, the mean reward and the seconds of each part."""
    started = time.perf_counter()
    sequences, prompt_mask, mask, old = generate(model, tokenizer, rows)
    texts = tokenizer.batch_decode(sequences[:, prompt_mask.shape[1] :], skip_special_tokens=True)
    wanted = [row["label"] for row in rows for _ in range(GROUP)]
    rewards = torch.tensor([float(text == label) for text, label in zip(texts, wanted, strict=True)])
    generated = time.perf_counter()
    train(model, optimizer, sequences, prompt_mask, mask, old, advantages_of(rewards))
    seconds = {"generate": generated - started, "train": time.perf_counter() - generated}
    return {"time": time.time(), "reward": float(rewards.mean()), "seconds": seconds}


def main() -> None:
    options = contest.options(__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.data / "warm")
    model = AutoModelForCausalLM.from_pretrained(options.data / "warm", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rows = load_rows(options.data / "train.jsonl")
    with options.out.open("w") as out:
        for number in range(options.rollouts):
            chosen = [rows[(number * PROMPTS + i) % len(rows)] for i in range(PROMPTS)]
            out.write(json.dumps({"rollout": number, **one_rollout(model, tokenizer, optimizer, chosen)}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
