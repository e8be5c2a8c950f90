"""A trainer of a tiny model, for tests: rollouts, configs, and trainers that are stopped at the end."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from safetensors.torch import load_file

from miles_api.config import RunConfig
from miles_api.hook_options import HookOptions
from miles_api.loading.load import import_reference
from miles_api.options import Options
from miles_api.run_options import RunOptions
from miles_train.options import BatchingOptions, ModelsOptions, ObjectiveOptions, OptimizerOptions, ParallelOptions
from miles_train.trainer import Trainer

VOCAB = 32
LR = 4e-3


class OtherOptions(Options, frozen=True, kw_only=True):
    """The one option of the rollout package without which hooks cannot be told apart."""

    group_rm: bool = False


def save_model(directory, seed=0):
    """Write a random two-layer Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)


def make_batch(groups=4, size=4, dead_groups=(), seed=0, **columns):
    """Return a rollout of random prompts and responses; the samples of dead groups have advantage 0."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: [] for name in ("tokens", "response_lengths", "loss_masks", "rewards", "sample_indices")}
    batch |= {"group_indices": [], "rollout_log_probs": []}
    for group in range(groups):
        prompt = torch.randint(VOCAB, (3 + group % 3,), generator=generator).tolist()
        for member in range(size):
            response = torch.randint(VOCAB, (2 + (group + member) % 4,), generator=generator).tolist()
            batch["tokens"].append(prompt + response)
            batch["response_lengths"].append(len(response))
            batch["loss_masks"].append([1] * (len(response) - 1) + [member % 2])
            batch["rewards"].append(0.0 if group in dead_groups else 1.0 if member % 2 else -1.0)
            batch["sample_indices"].append(100 + len(batch["sample_indices"]))
            batch["group_indices"].append(group)
            batch["rollout_log_probs"].append([-3.5] * len(response))
    return batch | columns


def make_config(hf_dir, *options, **run):
    run = {"loss_type": "policy_loss", "num_steps_per_rollout": 2, "num_rollout": 20} | run
    # A large epsilon lets the size of gradients show in the weights; Adam alone would hide a wrong factor.
    kinds = (HookOptions, OtherOptions, ParallelOptions, BatchingOptions, ObjectiveOptions, ModelsOptions)
    groups = {kind: kind() for kind in kinds}
    groups[OptimizerOptions] = OptimizerOptions(lr=LR, adam_eps=1e-2)
    groups |= {type(group): group for group in (RunOptions(hf_checkpoint=hf_dir, **run), *options)}
    return RunConfig({kind.__name__: group for kind, group in groups.items()}, {})


def meeting(rank=0, ports=None):
    """Return where the ranks of one trainer meet: one rank alone, or two to whom the queue `ports` tells the port."""
    place = {"rank": rank, "world_size": 2 if ports else 1, "master_addr": "127.0.0.1"}
    if rank:
        return {**place, "master_port": ports.get()}
    # It listens from here on: a port that was only looked up is taken by another process now and then.
    listener = socket.create_server((place["master_addr"], 0))
    port = listener.getsockname()[1]
    if ports:
        ports.put(port)
    return {**place, "master_port": port, "listen_fd": listener.detach()}


class Started:
    """A started single-rank trainer that is stopped at the end of the block."""

    def __init__(self, config):
        self.trainer = Trainer(config, **meeting())

    def __enter__(self):
        self.trainer.start()
        return self.trainer

    def __exit__(self, *error):
        self.trainer.stop()


def weights_of(trainer, directory):
    trainer.export(str(directory))
    return load_file(Path(directory) / "model.safetensors")


def train_once(config, directory, batch):
    """Train a fresh model on one rollout; return its weights and the report's metrics."""
    with Started(config) as trainer:
        report = trainer.train(0, batch)
        return weights_of(trainer, directory), report.metrics


def pop_packing(metrics):
    """Take out the metrics that depend on how samples are packed and spread; return the number of micro-batches."""
    for name in ("micro_batch_fill", "padding_share", "dp_imbalance"):
        metrics.pop(f"train/{name}", None)
    return metrics.pop("train/micro_batches")


def assert_same_weights(a, b, atol=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def differ(one, other, least=1e-5):
    """Say whether any weight differs clearly."""
    return any((one[name] - other[name]).abs().max() > least for name in one)


HOOKS = Path(__file__).with_name("train_side_hooks.py")
FLAGS = {
    "advantage": "custom_advantage_function_path",
    "loss": "custom_loss_function_path",
    "importance_weights": "custom_tis_function_path",
    "pg_loss_reducer": "custom_pg_loss_reducer_function_path",
    "rollout_data_postprocess": "rollout_data_postprocess_path",
    "megatron_init": "custom_megatron_init_path",
    "before_log_prob": "custom_megatron_before_log_prob_hook_path",
    "before_train_step": "custom_megatron_before_train_step_hook_path",
    "post_save": "custom_megatron_post_save_hook_path",
    "model_provider": "custom_model_provider_path",
}


def hooked(**functions):
    """Configure functions of `train_side_hooks.py`, by hook."""

    def reference(name):
        return [reference(one) for one in name] if isinstance(name, list) else f"{HOOKS}:{name}"

    return HookOptions(**{FLAGS[hook]: reference(name) for hook, name in functions.items()})


def calls_of(name):
    """Return what a function of `train_side_hooks.py` noted in this process under `name`."""
    calls = import_reference(f"{HOOKS}:CALLS", short_names="", flag="")
    return [what for noted, what in calls if noted == name]


def forget_calls():
    import_reference(f"{HOOKS}:CALLS", short_names="", flag="").clear()


def stats_of(trainer):
    """Return how each hook fared: `{name: (calls, skipped, errors)}`."""
    return {row["hook"]: (row["calls"], row["skipped"], row["errors"]) for row in trainer.report()}


def all_calls():
    """Return everything that functions of `train_side_hooks.py` noted in this process, in order."""
    return list(import_reference(f"{HOOKS}:CALLS", short_names="", flag=""))
