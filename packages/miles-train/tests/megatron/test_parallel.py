"""Two ranks train as one does: tensor, sequence, pipeline and data parallel, in processes of their own."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles_train.options import OptimizerOptions, ParallelOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
    "sharded": {"use_distributed_optimizer": True},
}
CASES = [*((layout, kind) for layout in LAYOUTS for kind in ("qwen3-tied", "qwen3-untied")), ("tensor", "qwen2")]
KINDS = ["qwen3-tied", "qwen3-untied", "qwen2"]


class GatherVocabulary(torch.autograd.Function):
    """Whole logits from each rank's part; all ranks compute the same loss, so each keeps its own part's gradient."""

    @staticmethod
    def forward(ctx, logits, group):
        ctx.rank, ctx.width = dist.get_rank(group), logits.shape[-1]
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, logits.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(-1, ctx.rank * ctx.width, ctx.width).contiguous(), None


def train_and_export(parallel, place, hf_dir, sequences, out, resume_from=None):
    """Train three steps, with a save and a load after the first; export; rank 0 notes the gradient norms.

    `resume_from` is loaded in place of the checkpoint that was just saved.
    """
    from miles_train.megatron import checkpoint, forward, hf, init
    from miles_train.megatron.core import parallel_state
    from miles_train.megatron.model import build_model
    from miles_train.megatron.optimizer import build_optimizer

    init.initialize(parallel, seed=1, **place)
    options = OptimizerOptions(lr=1e-2, clip_grad=0.5, adam_eps=1e-2)

    def build():
        model = build_model(hf_dir, parallel)
        return model, build_optimizer(model, options, parallel, total_steps=3)

    def loss_step(logits, batch):
        logits = GatherVocabulary.apply(logits, parallel_state.get_tensor_model_parallel_group())
        targets = torch.cat([tokens.roll(-1) for tokens in batch["tokens"]])
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 10, {"rows": len(logits)}

    def train(model, optimizer, steps):
        norms = []
        for _ in range(steps):
            mine = sequences[init.data_parallel_rank() :: init.data_parallel_size()]
            results = forward.run(model, [{"tokens": mine[:2]}, {"tokens": mine[2:]}], loss_step, forward_only=False)
            assert len(results) == (2 if init.is_last_stage() else 0)
            norms.append(optimizer.step()[1])
        return norms

    run = build()
    norms = train(*run, 1)
    checkpoint.save(*run, f"{out}/checkpoint")
    resumed = build()
    checkpoint.load(*resumed, resume_from or f"{out}/checkpoint", with_rng=resume_from is None)
    norms += train(*resumed, 2)
    hf.export_hf(resumed[0], hf_dir, f"{out}/export", extra_files=False)
    if init.is_first_rank():
        Path(out, "norms.json").write_text(json.dumps(norms))
    dist.barrier()
    init.shutdown()


def run_rank(rank, cases, ports):
    for layout, hf_dir, sequences, out in cases:
        parallel = ParallelOptions(actor_num_gpus_per_node=2, **layout)
        train_and_export(parallel, tiny.meeting(rank, ports), hf_dir, sequences, out)


def outcome(out):
    weights = {}
    for path in (out / "export").glob("*.safetensors"):
        weights |= load_file(path)
    return json.loads((out / "norms.json").read_text()), weights


@pytest.fixture(scope="module")
def outcomes(hf_dir, sequences, tmp_path_factory):
    """Run every case; starting processes costs most, so one pair of them runs all."""
    packed = sequences(5, 9, 3, 7, 2, 6)
    alone = [("alone", kind) for kind in KINDS]
    directories = {(name, kind): tmp_path_factory.mktemp(name) for name, kind in CASES + alone}
    for kind in KINDS:
        train_and_export(ParallelOptions(), tiny.meeting(), hf_dir(kind), packed, str(directories["alone", kind]))
    cases = [
        (LAYOUTS[name], hf_dir(kind), packed, str(out))
        for (name, kind), out in directories.items() if name != "alone"
    ]  # fmt: skip
    mp.spawn(run_rank, args=(cases, mp.get_context("spawn").SimpleQueue()), nprocs=2)
    return {key: (out, *outcome(out)) for key, out in directories.items()}


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_two_ranks_train_as_one_does(outcomes, layout, kind):
    _, norms, weights = outcomes[layout, kind]
    _, expected_norms, expected_weights = outcomes["alone", kind]
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "sharded"])
def test_one_rank_continues_from_what_two_ranks_saved(outcomes, layout, hf_dir, sequences, tmp_path):
    saved, expected_norms, _ = outcomes[layout, "qwen3-tied"]
    parallel = ParallelOptions(use_distributed_optimizer=layout == "sharded")
    packed = sequences(5, 9, 3, 7, 2, 6)
    train_and_export(parallel, tiny.meeting(), hf_dir("qwen3-tied"), packed, str(tmp_path), str(saved / "checkpoint"))
    assert json.loads((tmp_path / "norms.json").read_text()) == pytest.approx(expected_norms, rel=1e-4)
