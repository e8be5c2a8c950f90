"""What becomes of the flags about the objective, its models and micro-batches."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from miles_api.migrate.verdicts import Drop, Flag, Flags, Lack, Rule, Take

__all__ = ["OBJECTIVE", "estimator_of", "reads_kl", "whitens_only_here"]

_OF_A_FORM = re.compile(r"([-_.](torch|dist|megatron|mcore|hf|ckpt|checkpoint|release|iter|[tpec]p\d*|\d+))*", re.I)
"""What a converted checkpoint's name has behind its model's."""


def estimator_of(flags: Flags) -> str:
    """Return the advantage estimator: grpo where the script names none."""
    given = flags["--advantage-estimator"].values if "--advantage-estimator" in flags else []
    return given[0] if given else "grpo"


def reads_kl(flags: Flags) -> bool:
    """Say whether the script has a KL divergence from a reference model, in the loss or in rewards that read it."""
    in_rewards = "--kl-coef" in flags and flags["--kl-coef"].number != 0
    return "--use-kl-loss" in flags or (in_rewards and estimator_of(flags) not in ("grpo", "gspo"))


def whitens_only_here(flags: Flags) -> bool:
    """Say whether our estimator of that name whitens advantages unless it is told not to."""
    return estimator_of(flags) in ("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def _in_loss(flag: Flag, flags: Flags) -> Take | Drop:
    """Judge what only the KL divergence in the loss reads."""
    if "--use-kl-loss" not in flags:
        return Drop("without effect there too: --use-kl-loss is not given")
    return Take(flag.name[2:].replace("-", "_"), flag.values)


def _use_kl_loss(flag: Flag, flags: Flags) -> Take:
    weight = flags["--kl-loss-coef"].number if "--kl-loss-coef" in flags else 0.0
    remark = "" if weight else "of weight 0 only reported: without it the run needs no reference model"
    return Take("use_kl_loss", flag.values, remark)


def _kl_loss_type(flag: Flag, flags: Flags) -> Take | Drop:
    if not reads_kl(flags):
        return Drop("no KL divergence is computed")
    return Take("kl_loss_type", flag.values)


def _kl_coef(flag: Flag, flags: Flags) -> Take | Drop:
    if flag.number == 0:
        return Drop("0 is the default")
    estimator = estimator_of(flags)
    if estimator in ("grpo", "gspo"):
        return Drop(f"without effect there too: --advantage-estimator {estimator} does not read it")
    doubt = ""
    if estimator == "reinforce_plus_plus_baseline":
        doubt = "a token loses the divergences of all tokens from it on here, and its own alone there"
    return Take("kl_coef", flag.values, doubt=doubt)


def _ref_load(flag: Flag, flags: Flags) -> Take | Drop | Lack:
    """Judge the reference model, whose weights the policy begins with there."""
    same, bridge = _is_hf_checkpoint(flag, flags), _is_bridged(flag, flags)
    if not same:
        first = "also the first weights there: "
        if not bridge:
            return Lack(f"{first}convert it to a Hugging Face directory and name it as hf_checkpoint")
        doubt = f"{first}name it as hf_checkpoint"
        return Take("ref_load", flag.values, doubt=doubt) if reads_kl(flags) else Lack(doubt)
    if not reads_kl(flags):
        return Drop("the first weights come from hf_checkpoint, and nothing here needs a reference model")
    return Take("ref_load", flag.values) if bridge else Drop("the reference model is that of hf_checkpoint")


def _is_hf_checkpoint(flag: Flag, flags: Flags) -> bool:
    """Say whether a directory holds, by its name, the model of --hf-checkpoint, perhaps converted."""
    hf = flags.get("--hf-checkpoint")
    if hf is None or len(hf.values) != 1 or len(flag.values) != 1:
        return False
    model, name = PurePosixPath(hf.values[0]).name, PurePosixPath(flag.values[0]).name
    return name.startswith(model) and _OF_A_FORM.fullmatch(name[len(model) :]) is not None


def _is_bridged(flag: Flag, flags: Flags) -> bool:
    """Say whether a directory is one of Hugging Face."""
    bridge = "--megatron-to-hf-mode" in flags and flags["--megatron-to-hf-mode"].values == ["bridge"]
    return bridge or ("--hf-checkpoint" in flags and flags["--hf-checkpoint"].values == flag.values)


def _micro_batch(flag: Flag, flags: Flags) -> Take | Drop:
    if "--use-dynamic-batch-size" in flags:
        return Drop("without effect beside --use-dynamic-batch-size")
    return Take("micro_batch_size", flag.values)


def _chunk(flag: Flag, _flags: Flags) -> Take:
    if flag.number == -1:
        return Take("log_probs_chunk_size", None, "-1 there is no chunks")
    return Take("log_probs_chunk_size", flag.values)


def _of_ppo(flag: Flag, flags: Flags) -> Take | Drop:
    if estimator_of(flags) == "ppo":
        return Take(flag.name[2:].replace("-", "_"), flag.values)
    return Drop("the --advantage-estimator does not read it")


def _critic_load(flag: Flag, flags: Flags) -> Take | Drop | Lack:
    if estimator_of(flags) != "ppo":
        return _of_ppo(flag, flags)
    if _is_bridged(flag, flags):
        return Take("critic_load", flag.values)
    if _is_hf_checkpoint(flag, flags):
        return Drop("the critic's first body is that of hf_checkpoint")
    return Lack("the critic's first weights there: convert it to a Hugging Face directory and name it as critic_load")


def _gamma(flag: Flag, flags: Flags) -> Take | Drop:
    return Take("gamma", flag.values) if estimator_of(flags) == "reinforce_plus_plus" else _of_ppo(flag, flags)


def _distillation(flag: Flag, flags: Flags) -> Take | Drop:
    if "--use-opd" not in flags:
        return Drop("without effect there too: --use-opd is not given")
    if flag.name == "--opd-teacher-load":
        doubt = "a Hugging Face directory is read here: convert a Megatron checkpoint"
        return Take("opd_teacher_load", flag.values, doubt=doubt)
    return Take("opd_kl_coef", flag.values)


def _opd_type(flag: Flag, flags: Flags) -> Drop | Lack:
    if "--use-opd" not in flags or flag.values == ["megatron"]:
        return Drop("opd_teacher_load says it")
    return Lack("a teacher behind a server is a generate or reward hook's: it sets `teacher_log_probs` of samples")


OBJECTIVE: dict[str, Rule] = {
    "--gamma": _gamma,
    **dict.fromkeys(("--lambd", "--value-clip", "--num-critic-only-steps", "--critic-lr", "--critic-lr-warmup-iters"),
                    _of_ppo),
    "--critic-load": _critic_load,
    "--ref-load": _ref_load,
    "--use-kl-loss": _use_kl_loss,
    **dict.fromkeys(("--kl-loss-coef", "--use-unbiased-kl"), _in_loss),
    "--kl-loss-type": _kl_loss_type,
    "--kl-coef": _kl_coef,
    **dict.fromkeys(("--opd-kl-coef", "--opd-teacher-load"), _distillation),
    "--opd-type": _opd_type,
    "--micro-batch-size": _micro_batch,
    "--log-probs-chunk-size": _chunk,
}  # fmt: skip
"""Flags that have our name, with what decides whether they are needed."""
