"""TRL's side of `trainer.py`: one optimizer step of its GRPOTrainer for each line it reads, on samples that are there.

The trainer's own `compute_loss`, backward, clipping and AdamW on the batch as TRL lays it out: prompts padded left,
completions right, both to the longest of the batch. Answers a line `off` or `on` (old log-probs as the current ones, or
by a pass of their own, as TRL does it) with the step's gradient norm and process time. Runs in the hatch environment
`bench`.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad


def make_trainer(folder: Path, rows: int, micro_batch: int) -> GRPOTrainer:
    """Return TRL's trainer; what it measures for its own log stays on, as for its users."""
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch, num_generations=8, beta=0.0, loss_type="grpo",
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def padded(samples: dict[str, list]) -> dict[str, torch.Tensor]:
    """Return the batch as `GRPOTrainer._generate_and_score_completions` does."""
    batch = {"advantages": torch.tensor(samples["advantages"])}
    for name, side in (("prompt", "left"), ("completion", "right")):
        ids = [torch.tensor(one) for one in samples[name]]
        batch[f"{name}_ids"] = pad(ids, padding_value=0, padding_side=side)
        batch[f"{name}_mask"] = pad([torch.ones_like(one) for one in ids], padding_value=0, padding_side=side)
    return batch


def old_log_probs(trainer: GRPOTrainer, batch: dict[str, torch.Tensor], micro_batch: int) -> torch.Tensor:
    """Return the log-probs of the weights before the step."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], micro_batch
        )[0]


def main() -> None:
    folder, micro_batch = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    samples = json.loads((folder / "samples.json").read_text())
    rows = len(samples["prompt"])
    trainer = make_trainer(folder, rows, micro_batch)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = rows // micro_batch
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-9, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for line in sys.stdin:
        start = time.process_time()
        batch = padded(samples)
        batch |= {"old_per_token_logps": old_log_probs(trainer, batch, micro_batch)} if line.strip() == "on" else {}
        for first in range(0, rows, micro_batch):
            inputs = {name: values[first : first + micro_batch] for name, values in batch.items()}
            trainer.compute_loss(trainer.model, inputs).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"seconds": time.process_time() - start, "norm": norm}), flush=True)


if __name__ == "__main__":
    main()
