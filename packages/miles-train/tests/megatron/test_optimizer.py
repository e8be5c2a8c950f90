"""A step of the trainer is a step of transformers and torch's AdamW."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from miles_api.errors import MilesError
from miles_train.megatron import forward
from miles_train.megatron.hf import named_hf_tensors
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions


def loss_of(logits, batch):
    targets = torch.cat([tokens.roll(-1) for tokens in batch["tokens"]])
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 100, {}


@pytest.mark.parametrize("kind", ["qwen3-tied", "qwen3-untied", "llama"])
@pytest.mark.parametrize("sharded", [False, True])
def test_steps_equal_those_of_transformers_and_torch_adamw(megatron, hf_dir, sequences, kind, sharded):
    parallel = ParallelOptions(use_distributed_optimizer=sharded)
    # a large epsilon keeps the update proportional to the gradient, whose scale Adam would hide
    options = OptimizerOptions(lr=1e-2, weight_decay=0.1, clip_grad=0.5, adam_eps=1e-2)
    model = build_model(hf_dir(kind), parallel)
    optimizer = build_optimizer(model, options, parallel, total_steps=3)
    reference = AutoModelForCausalLM.from_pretrained(hf_dir(kind), dtype=torch.float32)
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    norms = [p for p in reference.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-2,
    )  # fmt: skip
    for step in range(3):
        batches = [{"tokens": sequences(3, 8, 5, seed=step)}, {"tokens": sequences(12, seed=step)}]
        forward.run(model, batches, loss_of, forward_only=False)
        updated, norm = optimizer.step()
        adamw.zero_grad()
        for batch in batches:
            logits = torch.cat([reference(input_ids=tokens[None]).logits[0] for tokens in batch["tokens"]])
            loss_of(logits, batch)[0].backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        adamw.step()
        assert updated
        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
        assert norm > 0.5
    expected = dict(reference.named_parameters())
    for name, tensor in named_hf_tensors(model):
        torch.testing.assert_close(tensor, expected[name].detach(), atol=1e-5, rtol=1e-5)


def test_warm_up_and_decay_follow_the_options(megatron, hf_dir, sequences):
    options = OptimizerOptions(lr=1.0, min_lr=0.2, lr_decay_style="linear", lr_warmup_iters=2)
    model = build_model(hf_dir("llama"), ParallelOptions())
    optimizer = build_optimizer(model, options, ParallelOptions(), total_steps=6)
    rates = []
    for _ in range(8):
        rates.append(optimizer.learning_rate)
        forward.run(model, [{"tokens": sequences(3)}], loss_of, forward_only=False)
        optimizer.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_a_gradient_that_is_not_finite_names_its_parameter_and_changes_nothing(megatron, hf_dir, sequences):
    model = build_model(hf_dir("qwen3-untied"), ParallelOptions())
    optimizer = build_optimizer(model, OptimizerOptions(lr=1e-2), ParallelOptions(), total_steps=3)
    before = {name: tensor.clone() for name, tensor in named_hf_tensors(model)}
    forward.run(model, [{"tokens": sequences(3)}], loss_of, forward_only=False)
    parameters = dict(model[0].named_parameters())
    parameters["module.decoder.layers.1.mlp.linear_fc2.weight"].main_grad[0, 0] = float("nan")
    with pytest.raises(MilesError, match=r"1 of 1536 gradients of decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in named_hf_tensors(model))
    forward.run(model, [{"tokens": sequences(3)}], loss_of, forward_only=False)
    assert optimizer.step()[0]
