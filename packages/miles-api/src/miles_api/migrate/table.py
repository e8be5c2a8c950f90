"""What each flag of Miles 0.x, slime and their Megatron-LM becomes here, where its name alone does not say it.

A flag that is in no table and has the name of an option of ours is taken over as it is; so are hooks.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from miles_api.migrate.objective import OBJECTIVE
from miles_api.migrate.router import ROUTER, ROUTER_PREFIXES
from miles_api.migrate.verdicts import Drop, Flag, Flags, Lack, Rule, Take, drop, lack, only, renamed, with_value

__all__ = ["OURS", "PREFIXES", "THEIRS", "program_rule"]

_CONFIG = "the model's config.json in hf_checkpoint says it"
_MEMORY = "saves memory and changes no result; not needed here"
_SPEED = "makes GPUs faster and changes no result; not needed here"
_PLACEMENT = "engines and trainer are placed without it"
_PRECISION = "the trainer computes in fp32"
_CHECKPOINT = "checkpoints are whole and staged here, in one form"


def _load(flag: Flag, flags: Flags) -> Drop | Lack:
    if "--save" in flags and flags["--save"].values == flag.values:
        return Drop("continues from --save where there is a checkpoint; here `miles train run.toml --load DIR` does")
    return Lack("a checkpoint of another stack cannot be continued; convert it to a Hugging Face directory and name "
                "that as hf_checkpoint")  # fmt: skip


def _save_hf(flag: Flag, _flags: Flags) -> Take:
    path = flag.values[0] if flag.values else ""
    if "{" not in path:
        return Take("save_hf", flag.values)
    folder = str(PurePosixPath(path[: path.index("{")] + "x").parent)
    return Take("save_hf", [folder], "written once, after the last rollout: no placeholder")


def _eval_data(flag: Flag, _flags: Flags) -> Take | Lack:
    names, paths = flag.values[0::2], flag.values[1::2]
    if len(flag.values) == 1:
        names, paths = [""], flag.values
    if not paths:
        return Lack("it names no file")
    doubt = _data_doubt(paths[0])
    if len(paths) > 1:
        others = ", ".join(names[1:])
        doubt = "; ".join(filter(None, (doubt, f"one file is evaluated here: {others} left out")))
    return Take("eval_prompt_data", [paths[0]], f"the data set {names[0]}" if names[0] else "", doubt)


def _prompt_data(flag: Flag, _flags: Flags) -> Take:
    return Take("prompt_data", flag.values, doubt=_data_doubt(flag.values[0] if flag.values else ""))


def _data_doubt(path: str) -> str:
    if "@[" in path:
        return "a part of a file (@[…]) cannot be named: write these lines to a file of their own"
    return "" if path.endswith((".jsonl", ".json")) or "$" in path else "only JSONL is read here: convert the file"


def _dump(key: str) -> Rule:
    def rule(flag: Flag, _flags: Flags) -> Take:
        path = flag.values[0] if flag.values else ""
        if "{" not in path:
            return Take(key, flag.values)
        name = "train" if "train" in key else "rollout"
        folder = PurePosixPath(path[: path.index("{")] + "x").parent
        return Take(key, [str(folder / f"{name}.mdump")], "one file for all rollouts")

    return rule


def _same_as(name: str) -> Rule:
    def rule(flag: Flag, flags: Flags) -> Drop | Lack:
        if name in flags and flags[name].values == flag.values:
            return Drop(f"evaluation data has the keys of {name}")
        return Lack(f"evaluation data needs the same keys as training data ({name})")

    return rule


def _in_sft(flag: Flag, flags: Flags) -> Drop | Lack:
    if "--loss-type" in flags and flags["--loss-type"].values == ["sft_loss"]:
        engines = flag.name == "--debug-train-only"
        return Drop("no engine starts with sft_loss" if engines else "a supervised loss needs no advantages")
    return Lack("write an advantage hook, or train on recorded rollouts with load_debug_rollout_data")


def program_rule(program: str) -> Lack | None:
    """Judge the program that the script starts."""
    if program == "train_async.py":
        return Lack('set rollout_schedule = "one-step-off", or "in-flight": rollouts one step ahead of training')
    return None if program in ("train.py", "") else Lack("only train.py is known here")


OURS: dict[str, Rule] = {
    "--load": _load,
    "--save-hf": _save_hf,
    "--prompt-data": _prompt_data,
    "--eval-prompt-data": _eval_data,
    "--save-debug-rollout-data": _dump("save_debug_rollout_data"),
    "--save-debug-train-data": _dump("save_debug_train_data"),
    **lack("a file of another stack: record one here with save_debug_rollout_data", "--load-debug-rollout-data"),
    **OBJECTIVE,
    **ROUTER,
}
"""Flags that have our name for something and write it in another way."""

THEIRS: dict[str, Rule] = {
    # Cluster
    **drop(_PLACEMENT, "--num-gpus-per-node", "--distributed-backend", "--distributed-timeout-minutes"),
    **lack("colocate gives up memory on both sides, offload_train and offload_rollout on one", "--offload"),
    **only("megatron", "Megatron-Core trains", "only Megatron-Core trains here", "--train-backend"),
    **drop("the driver sets what its processes need", "--train-env-vars"),
    **drop("weights go by files, whole, after each step", "--update-weight-buffer-size", "--update-weight-transport",
           "--update-weights-interval", "--megatron-to-hf-mode", "--model-name"),
    **lack("engines are watched; one that dies ends the run", "--use-fault-tolerance",
           "--rollout-health-check-interval", "--rollout-health-check-timeout", "--rollout-health-check-first-wait"),
    **drop("the critic is on the ranks of the policy", "--critic-num-nodes", "--critic-num-gpus-per-node"),
    **drop("the critic is a part of the run's checkpoints", "--critic-save"),
    # Parallelism
    **only(1, "no expert parallelism", "there is no expert parallelism in this build", "--expert-model-parallel-size",
           "--expert-tensor-parallel-size"),
    **lack("the pipeline is split evenly", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers",
           "--num-layers-per-virtual-pipeline-stage"),
    **drop(_MEMORY, "--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules",
           "--recompute-loss-function", "--optimizer-cpu-offload",
           "--overlap-cpu-optimizer-d2h-h2d", "--use-precision-aware-optimizer", "--gradient-checkpointing",
           "--log-probs-max-tokens-per-gpu", "--fsdp-cpu-offload", "--cpu-offloading-num-layers"),
    **drop(_SPEED, "--overlap-grad-reduce", "--overlap-param-gather", "--attention-backend", "--no-rope-fusion",
           "--no-gradient-accumulation-fusion", "--attn-implementation", "--moe-grouped-gemm", "--moe-permute-fusion",
           "--no-check-for-nan-in-loss-and-grad", "--manual-gc", "--manual-gc-interval", "--allgather-cp"),
    **drop(_PRECISION, "--bf16", "--fp16", "--accumulate-allreduce-grads-in-fp32", "--attention-softmax-in-fp32",
           "--grad-reduce-in-bf16"),
    **only("thd", "sequences are packed", "sequences are always packed here", "--qkv-format"),
    # Model
    **drop(_CONFIG, "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--vocab-size",
           "--group-query-attention", "--num-query-groups", "--kv-channels", "--qk-layernorm", "--swiglu",
           "--normalization", "--norm-epsilon", "--use-rotary-position-embeddings", "--rotary-base", "--rotary-percent",
           "--disable-bias-linear", "--add-qkv-bias", "--untie-embeddings-and-output-weights", "--seq-length",
           "--max-position-embeddings", "--make-vocab-size-divisible-by", "--padded-vocab-size", "--num-experts",
           "--position-embedding-type", "--no-position-embedding", "--tokenizer-type", "--tokenizer-model",
           "--post-self-attn-layernorm", "--post-mlp-layernorm", "--attention-output-gate", "--rotary-scaling-factor"),
    **lack("the model provider hook (custom_model_provider_path) builds other architectures", "--spec",
           "--multi-latent-attention", "--mtp-num-layers", "--enable-mtp-training", "--mtp-loss-scaling-factor"),
    **only(0, "there is no dropout", "there is no dropout here", "--attention-dropout", "--hidden-dropout",
           "--lora-dropout"),
    **lack("images and other media are not trained in this version", "--multimodal-keys"),
    # Checkpoints
    **drop(_CHECKPOINT, "--ckpt-format", "--dist-ckpt-strictness", "--async-save", "--use-dist-ckpt", "--no-load-optim",
           "--no-load-rng", "--finetune", "--async-strategy", "--use-persistent-ckpt-worker"),
    **lack("optimizer state is always saved", "--no-save-optim", "--no-save-rng"),
    **lack("pass --load with the checkpoint to continue from", "--start-rollout-id", "--ckpt-step", "--ref-ckpt-step"),
    # Data and rollouts
    **lack("count it: num_rollout = epochs × prompts / rollout_batch_size", "--num-epoch"),
    **lack("evaluation has temperature, top-p and length of its own, and no more", "--eval-min-new-tokens",
           "--eval-max-prompt-len", "--eval-max-context-len"),
    "--eval-top-k": lambda flag, _flags: (
        Take("eval_temperature", ["0"], "top-k 1 is greedy") if flag.number == 1 else
        Drop("no top-k is the default") if flag.number == -1 else Lack("evaluation has no top-k")
    ),
    "--eval-input-key": _same_as("--input-key"),
    "--eval-label-key": _same_as("--label-key"),
    "--eval-tool-key": _same_as("--tool-key"),
    **lack("name one file in eval_prompt_data", "--eval-config"),
    **lack("the first evaluation is always made before training", "--skip-eval-before-train"),
    **lack("the chat template says which tokens train in sft", "--loss-mask-type"),
    # Rewards and objective
    **with_value("grpo_std_normalization", False, "", "--disable-grpo-std-normalization"),
    **with_value("rewards_normalization", False, "", "--disable-rewards-normalization"),
    **dict.fromkeys(("--disable-compute-advantages-and-returns", "--debug-train-only"), _in_sft),
    **lack("the reference model stays as it is", "--ref-update-interval"),
    **lack("an importance-weights hook (custom_tis_function_path) can do it", "--use-opsm", "--opsm-delta"),
    **lack("expert choices are not replayed in this build", "--use-routing-replay", "--use-rollout-routing-replay"),
    **lack("give the values to the hooks that read them, as [hooks.NAME] with `fn.options`", "--custom-config-path"),
    # Optimizer
    **only("adam", "the optimizer is AdamW", "the optimizer is AdamW", "--optimizer"),
    **lack("give lr_warmup_iters, in optimizer steps", "--lr-warmup-fraction", "--lr-warmup-samples"),
    **lack("a decay goes over the whole run", "--lr-decay-iters", "--lr-decay-samples", "--lr-wsd-decay-style",
           "--lr-wsd-decay-iters"),
    **lack("the optimizer's state is kept", "--reset-optimizer-states"),
    # Router and engines
    **drop("miles-router always routes", "--use-slime-router", "--use-miles-router"),
    **renamed("engine_max_total_len", "of each engine", "--sglang-context-length"),
    **renamed("engine_max_running_requests", "of each engine", "--sglang-max-running-requests"),
    # Logging
    **lack("set WANDB_API_KEY in the environment: keys do not belong in files", "--wandb-key"),
    **lack("set WANDB_RUN_GROUP in the environment", "--wandb-group"),
    **lack("set WANDB_ENTITY in the environment", "--wandb-team"),
    **lack("set WANDB_MODE, WANDB_DIR, WANDB_BASE_URL or WANDB_RUN_ID in the environment", "--wandb-mode",
           "--wandb-dir", "--wandb-host", "--wandb-run-id"),
    **drop("runs are named by their directory", "--disable-wandb-random-suffix", "--tb-project-name",
           "--tb-experiment-name"),
    **drop("metrics are by rollout and by step", "--wandb-always-use-train-step", "--log-interval"),
    **lack("a rollout_log hook (custom_rollout_log_function_path) can do it", "--log-passrate", "--log-multi-turn",
           "--log-reward-category", "--log-correct-samples"),
    **lack("record with save_debug_rollout_data and save_debug_train_data", "--dump-details"),
    **lack("there is no such switch; `seed` and `rollout_seed` are set", "--deterministic-mode"),
    **drop("a check of its own tests", "--ci-test", "--ci-disable-kl-checker", "--check-weight-update-equal"),
}  # fmt: skip
"""Flags that are no option of ours, or not yet: an option of the same name comes first."""

PREFIXES: dict[str, Rule] = {
    **ROUTER_PREFIXES,
    **drop(_CONFIG, "--moe-", "--rope-", "--linear-"),
    **lack(
        "the engine here is `local`, which has no such setting; --rollout-engine sglang takes the flag as it is",
        "--sglang-",
    ),
    **lack("the engine here is `local`, which has no such setting", "--eval-sglang-", "--vllm-"),
    **lack("adapters (LoRA) are not trained in this version", "--lora-", "--target-modules"),
    **lack("FSDP is no backend here", "--fsdp-"),
}
"""By how a flag begins; asked last."""
