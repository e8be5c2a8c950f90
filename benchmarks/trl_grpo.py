"""The quickstart's job on TRL's GRPOTrainer: what a user of TRL would write, and nothing slower.

Same warmed model, prompts, reward, batch arithmetic, optimizer and clipping; one line of JSON a rollout. Gradient
checkpointing, mixed precision, external reporting and saving are off; the old log-probs are recomputed and samples
without advantage trained on, which TRL offers no switch for. Runs in the hatch environment `bench`.
"""

import json
import tempfile
import time

import contest
import torch
from contest import CLIP_HIGH, CLIP_LOW, GROUP, LEARNING_RATE, NEW_TOKENS, PROMPTS, STEPS
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Rows(TrainerCallback):
    """Scores answers and writes one line a rollout."""

    __name__ = "sorted_digits"

    def __init__(self, out):
        self.out, self.reward = out, 0.0

    def __call__(self, *, completions, label, **_):
        """Score the answers of one rollout."""
        scores = [float(answer == wanted) for answer, wanted in zip(completions, label, strict=True)]
        self.reward = sum(scores) / len(scores)
        return scores

    def on_step_end(self, _args, state, *_, **__):
        """Say when a rollout's last step has ended."""
        if state.global_step % STEPS == 0:
            line = {"rollout": state.global_step // STEPS - 1, "time": time.time(), "reward": self.reward}
            self.out.write(json.dumps(line) + "\n")
            self.out.flush()


def configuration(folder: str, rollouts: int) -> GRPOConfig:
    """Return the quickstart's options in TRL's words."""
    return GRPOConfig(
        output_dir=folder, max_steps=STEPS * rollouts, seed=0,
        per_device_train_batch_size=PROMPTS * GROUP // STEPS, gradient_accumulation_steps=1,
        steps_per_generation=STEPS, num_iterations=1, num_generations=GROUP, max_completion_length=NEW_TOKENS,
        temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="grpo",
        scale_rewards="group", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def main() -> None:
    options = contest.options(__doc__)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (options.data / "train.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(options.data / "warm", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder, options.out.open("w") as out:
        lines = Rows(out)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lines,
            args=configuration(folder, options.rollouts),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.data / "warm"),
            callbacks=[lines],
        )
        trainer.train()


if __name__ == "__main__":
    main()
