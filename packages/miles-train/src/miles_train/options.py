"""What can be set about training: parallelism, optimizer, objective, micro-batches, cluster and logging."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from miles_api.options import Options, UserPath

__all__ = [
    "BatchingOptions",
    "ClusterOptions",
    "LoggingOptions",
    "ModelsOptions",
    "ObjectiveOptions",
    "OptimizerOptions",
    "ParallelOptions",
    "WeightSyncOptions",
]

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_NonNegative = Annotated[float, msgspec.Meta(ge=0)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class ParallelOptions(Options, frozen=True, kw_only=True):
    """How the trainer's model is spread over ranks."""

    actor_num_nodes: _Positive = 1
    """Nodes that hold trainer ranks."""
    actor_num_gpus_per_node: _Positive = 1
    """Trainer ranks on each node: one a GPU, or one a CPU process where there is none."""
    tensor_model_parallel_size: _Positive = 1
    """Tensor parallel size (TP)."""
    pipeline_model_parallel_size: _Positive = 1
    """Pipeline parallel size (PP)."""
    context_parallel_size: _Positive = 1
    """Context parallel size (CP)."""
    sequence_parallel: bool = False
    """Split activations of norms over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""

    @property
    def world_size(self) -> int:
        """How many trainer ranks there are."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    @property
    def data_parallel_size(self) -> int:
        """How many data-parallel replicas there are (DP)."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        return self.world_size // model


class OptimizerOptions(Options, frozen=True, kw_only=True):
    """AdamW and its learning-rate schedule."""

    lr: _NonNegative = 1e-6
    """Peak learning rate."""
    min_lr: _NonNegative = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after warm-up."""
    lr_warmup_iters: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: _NonNegative = 0.0
    """Decoupled weight decay; not applied to norms and biases."""
    adam_beta1: _Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: _Fraction = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    clip_grad: _NonNegative = 1.0
    """Largest global gradient norm; 0 does not clip."""


class ObjectiveOptions(Options, frozen=True, kw_only=True):
    """What the policy loss is made of."""

    advantage_estimator: Literal[
        "grpo", "gspo", "ppo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
    ] = "grpo"
    """How rewards become advantages: normalised within groups (grpo, and gspo, whose importance ratio is of whole
    responses), by a critic's values (ppo), less the mean of the group's others (rloo), discounted and whitened over the
    rollout (reinforce_plus_plus), less the group's mean and whitened (reinforce_plus_plus_baseline)."""
    gamma: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Discount of what follows for each token, with ppo and reinforce_plus_plus."""
    lambd: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Lambda of generalised advantage estimation (arXiv 1506.02438), with ppo: 1 trusts rewards, 0 the critic."""
    normalize_advantages: bool | None = None
    """Whiten advantages over the unmasked tokens of the rollout; default: with ppo and both reinforce_plus_plus."""
    policy_loss_type: Literal["clip", "cispo"] = "clip"
    """How the importance ratio enters the policy loss: clipped, where a clipped token no longer pulls (PPO, arXiv
    1707.06347), or as a clipped weight of every token (CISPO, arXiv 2506.13585)."""
    eps_clip: _NonNegative = 0.2
    """Lower clip of the importance ratio: ratios below 1 - eps are clipped; 1 sets no lower clip."""
    eps_clip_high: _NonNegative | None = None
    """Upper clip, 1 + eps (clip-higher, DAPO, arXiv 2503.14476); default: the same as --eps-clip."""
    eps_clip_c: Annotated[float, msgspec.Meta(gt=1)] | None = None
    """Dual clip (arXiv 1912.09729): ratios above this no longer pull where the advantage is negative."""
    value_clip: Annotated[float, msgspec.Meta(gt=0)] | None = 0.2
    """With ppo, how far a value may move from the one before the rollout's first step until it no longer pulls; null
    sets no bound."""
    use_kl_loss: bool = False
    """Add --kl-loss-coef times the KL divergence from the reference model to the loss; with 0, only report it."""
    kl_loss_coef: _NonNegative = 0.0
    """Weight of the KL divergence in the loss."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] | None = None
    """Estimate of the KL divergence of a token: k1 = log-ratio, k2 = its square by two, k3 = ratio - 1 - log-ratio
    (joschu.net/blog/kl-approx.html); low_var_kl is k3 kept within 10 nats. Default: k3 in the loss and k1 in the
    reward, where the others' gradient is not that of the divergence."""
    use_unbiased_kl: bool = False
    """Weight the KL divergence in the loss by the importance ratio, which makes its gradient unbiased on tokens of an
    older policy (arXiv 2512.02556)."""
    kl_coef: _NonNegative = 0.0
    """Weight of the KL divergence from the reference model that is taken off each token's reward, before discounts;
    with an estimator that takes plain rewards."""
    use_opd: bool = False
    """On-policy distillation: add to each token's advantage how much likelier it is to the teacher."""
    opd_kl_coef: _NonNegative = 1.0
    """Weight of the teacher's part, --opd-kl-coef times (teacher - old log-prob), with --use-opd."""
    entropy_coef: _NonNegative = 0.0
    """Weight of the entropy bonus."""
    report_entropy: bool = False
    """Report the mean entropy of the policy, train/entropy, also without a bonus: one more pass over the logits."""
    calculate_per_token_loss: bool = False
    """Average over all tokens of a step instead of over rollouts of their own means."""
    loss_length_norm: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Divide the sum over a rollout's tokens by this constant instead of by their number (Dr.GRPO, arXiv 2503.20783:
    the longest response)."""
    use_tis: bool = False
    """Correct the policy loss for the gap between trainer and engine: truncated importance sampling, or the
    --custom-tis-function-path. Needs the engine's log-probs."""
    get_mismatch_metrics: bool = False
    """Report what the importance-weights function measures, without correcting the loss."""
    tis_clip: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """Upper bound of a token's importance weight exp(train - rollout log-prob)."""
    tis_clip_low: _NonNegative = 0.0
    """Lower bound of a token's importance weight."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as the old ones and skip the pass that recomputes them. Sound when engine and
    trainer agree, which train/logprob_gap_max reports."""
    skip_zero_advantage: bool = False
    """Leave samples whose advantages are all 0 out of the forward pass: they add nothing to the gradient of a policy
    loss without entropy bonus, whatever the reducer hook. Denominators still count them. Without effect with a custom
    loss, or with --use-tis and an importance-weights hook: these may pull without an advantage."""


class ModelsOptions(Options, frozen=True, kw_only=True):
    """The models beside the policy: reference, teacher, critic. Each has the policy's parallel sizes."""

    ref_load: UserPath | None = None
    """Hugging Face directory of the reference model of KL divergences; default: --hf-checkpoint."""
    opd_teacher_load: UserPath | None = None
    """Hugging Face directory of the teacher of --use-opd, with the policy's vocabulary; default: the rollout brings
    `teacher_log_probs`."""
    critic_load: UserPath | None = None
    """Hugging Face directory of ppo's critic, which gets a value head of zeros; default: --hf-checkpoint."""
    critic_lr: _NonNegative | None = None
    """Peak learning rate of the critic; default: --lr."""
    critic_lr_warmup_iters: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Optimizer steps of linear warm-up of the critic's learning rate."""
    num_critic_only_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Rollouts at the beginning of a run that train the critic alone."""


class BatchingOptions(Options, frozen=True, kw_only=True):
    """How a step's samples are packed into micro-batches."""

    use_dynamic_batch_size: bool = True
    """Pack samples into micro-batches of at most --max-tokens-per-gpu tokens; off: --micro-batch-size samples each."""
    max_tokens_per_gpu: _Positive = 8192
    """Most tokens packed into one micro-batch; one longer sample gets a micro-batch of its own."""
    micro_batch_size: _Positive | None = None
    """Samples in one micro-batch, whatever their lengths, with --no-use-dynamic-batch-size; default: 1."""
    balance_data: bool = True
    """Give each data-parallel rank about the same work in every optimizer step; off: samples in turn."""
    balance_by_flops: bool = False
    """Balance the arithmetic of samples, in which attention grows with the square of the length, instead of tokens."""
    log_probs_chunk_size: _Positive | None = 1024
    """Rows of logits of which log-probs are computed at a time: bounds the memory beside the logits."""


class WeightSyncOptions(Options, frozen=True, kw_only=True):
    """How new weights get to the engines, and how it is proved that the engines serve them."""

    update_weight_transfer_mode: Literal["auto", "disk", "tensor", "broadcast"] = "auto"
    """`disk`: engines read a directory, in memory where there is room. `tensor`: they read memory that they share with
    the trainer, on one machine. `broadcast`: a process group of trainer and engines (NCCL, on a CPU gloo). `auto`: on
    GPUs `tensor` with --colocate and else `broadcast`; without GPUs `disk`."""
    update_weight_buffer_size: _Positive = 512 * 1024**2
    """Bytes of weights that are sent at a time, with `tensor` and `broadcast`; the trainer gathers the next ones
    meanwhile, in a second buffer."""
    pause_generation_mode: Literal["abort", "retract", "in_place"] = "retract"
    """What happens to requests that run when new weights come. `retract`: they go on from where they are, and what was
    computed for their tokens is computed anew with the new weights. `in_place`: they go on with what the old weights
    computed. `abort`: they end with what they have."""
    weight_check_interval: Annotated[int, msgspec.Meta(ge=0)] = 10
    """Check each so many versions of the weights; 0 checks only the first push of a run, which is always checked, as is
    the one after an engine was replaced. A check compares a hash of every tensor with the engine's, where an engine
    offers such hashes, and the log-probs of fixed sequences of random tokens. A difference stops the run."""
    weight_check_tolerance: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """How many nats the log-probs of trainer and engine may be apart in the mean over one probe sequence. The mean,
    because between two bf16 kernels the log-prob of one unlikely token differs by half a nat, while wrong weights move
    all tokens. Default: 1e-3 for fp32 weights, where 1e-5 was measured on a 135 M model, else 0.5, where 0.2 was; one
    tensor taken from another layer gave 1.5."""


class ClusterOptions(Options, frozen=True, kw_only=True):
    """Where the run's processes live, and who has which GPUs when."""

    ray_address: str | None = None
    """Address of a running Ray cluster; default: a Ray of its own on this machine."""
    rollout_schedule: Literal["sync", "one-step-off", "in-flight"] = "sync"
    """`sync`: make a rollout, train on it. `one-step-off`: make the next rollout while this one trains, by weights that
    are one version older than those that train on it; the metric rollout/staleness says so. `in-flight`: the same, and
    new weights do not wait for the rollout that is being made: what it generates from then on is theirs."""
    colocate: bool = False
    """Give engines the trainer's GPUs: the two take turns. Off: --rollout-num-gpus beside those of the trainer."""
    rollout_num_gpus: _Positive | None = None
    """GPUs of all engines together; default: --rollout-num-engines times --rollout-num-gpus-per-engine, with
    --colocate all GPUs of the trainer."""
    rollout_num_gpus_per_engine: _Positive = 1
    """GPUs of each engine. Where there is no GPU, an engine and a trainer rank take one CPU slot for each."""
    offload_train: bool | None = None
    """Move the trainer's models and optimizers to host memory while engines generate; default: with --colocate."""
    offload_rollout: bool | None = None
    """Let engines give up weights and keys and values while the trainer trains; default: with --colocate."""
    trainer_timeout: Annotated[float, msgspec.Meta(gt=0)] = 1800.0
    """Seconds that the trainer ranks may take to start, to train one rollout or to save before the run stops, with the
    stacks of all processes in its directory."""
    rollout_timeout: Annotated[float, msgspec.Meta(gt=0)] = 7200.0
    """The same for the rollout process and one rollout or evaluation. Requests and hooks have deadlines of their own:
    this is for what they miss."""
    engine_max_restarts: Annotated[int, msgspec.Meta(ge=0)] = 3
    """How often each engine, and the router, is replaced in one run when it dies; the next death stops the run. A few,
    for a stray kill or a moment without memory: what dies again and again has a cause that a restart does not mend."""

    @property
    def trainer_gives_way(self) -> bool:
        """Whether the trainer's memory is freed while engines generate."""
        return self.colocate if self.offload_train is None else self.offload_train

    @property
    def engines_give_way(self) -> bool:
        """Whether the engines' memory is freed while the trainer trains."""
        return self.colocate if self.offload_rollout is None else self.offload_rollout


class LoggingOptions(Options, frozen=True, kw_only=True):
    """Where metrics go besides `metrics.jsonl` and `report.html`."""

    use_tensorboard: bool = False
    """Also write TensorBoard events below the run directory (needs the tensorboard package)."""
    use_wandb: bool = False
    """Also log to Weights & Biases (needs the wandb package)."""
    wandb_project: str | None = None
    """Weights & Biases project."""
