"""Several ranks compute what one computes: tensor, pipeline and data parallel, each in processes of its own."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles_train.options import OptimizerOptions, ParallelOptions

STEPS = 3
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
    "sharded": {"use_distributed_optimizer": True},
}

def run_rank(rank, world_size, layout, port, hf_dir, sequences, out):
    """Train a few steps; every rank exports, the one with logits reports gradient norms."""
    from miles_train.megatron import checkpoint, forward, hf, init
    from miles_train.megatron.core import parallel_state
    from miles_train.megatron.model import build_model
    from miles_train.megatron.optimizer import build_optimizer

    parallel = ParallelOptions(actor_num_gpus_per_node=world_size, **layout)
    init.initialize(parallel, rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=port, seed=1)
    options = OptimizerOptions(lr=1e-2, clip_grad=0.5, adam_eps=1e-2)

    def build():
        model = build_model(hf_dir, parallel)
        return model, build_optimizer(model, options, parallel, total_steps=STEPS)

    def loss_step(logits, batch):
        logits = torch.distributed.nn.functional.all_gather(
            logits, group=parallel_state.get_tensor_model_parallel_group()
        )
        # each tensor-parallel rank backpropagates the same loss, and all_gather's gradient sums over them
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return torch.cat(logits, dim=-1).square().sum() / 1000 / ranks, {"rows": len(logits[0])}

    def train(run, steps):
        norms = []
        for _ in steps:
            mine = sequences[init.data_parallel_rank() :: init.data_parallel_size()]
            batches = [{"tokens": mine[:2]}, {"tokens": mine[2:]}]
            results = forward.run(run[0], batches, loss_step, forward_only=False)
            assert bool(results) == init.is_last_stage()
            norms.append(run[1].step()[1])
        return norms

    model, optimizer = build()
    norms = train((model, optimizer), range(1))
    checkpoint.save(model, optimizer, f"{out}/checkpoint")
    resumed = build()
    checkpoint.load(*resumed, f"{out}/checkpoint")
    norms += train(resumed, range(STEPS - 1))
    hf.export_hf(resumed[0], hf_dir, f"{out}/export", extra_files=False)
    if rank == 0:
        with open(f"{out}/norms.json", "w") as file:
            json.dump(norms, file)
    init.shutdown()

@pytest.fixture(scope="module")
def train(hf_dir, sequences, free_port, tmp_path_factory):

    packed = sequences(5, 9, 3, 7, 2, 6)

    def run(kind, layout, world_size):
        out = tmp_path_factory.mktemp("run")
        args = (world_size, layout, free_port(), hf_dir(kind), packed, str(out))
        mp.spawn(run_rank, args=args, nprocs=world_size)
        weights = {}
        for path in (out / "export").glob("*.safetensors"):
            weights |= load_file(path)
        return json.loads((out / "norms.json").read_text()), weights

    return run

@pytest.fixture(scope="module")
def alone(train):
    return {kind: train(kind, {}, 1) for kind in ("qwen3-tied", "qwen3-untied")}

@pytest.mark.parametrize("kind", ["qwen3-tied", "qwen3-untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one_does(train, alone, kind, layout):
    norms, weights = train(kind, LAYOUTS[layout], 2)
    expected_norms, expected_weights = alone[kind]
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=2e-5, rtol=1e-4)
