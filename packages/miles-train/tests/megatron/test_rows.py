"""Logits of response rows alone train as logits of all rows do, on one rank and on two."""

from importlib import import_module

import pytest
import torch
import torch.multiprocessing as mp

from miles_train.log_probs import packed_log_probs_and_entropy, response_rows
from miles_train.megatron import forward, init
from miles_train.megatron.core import parallel_state, unwrap
from miles_train.megatron.model import build_model
from miles_train.options import ParallelOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
}
KINDS = ["qwen3-tied", "qwen3-untied"]
# the third micro-batch has nothing to train on; with sequence parallelism the first and third are padded
RESPONSES = [([6, 3, 8], [4, 0, 7]), ([5, 7], [2, 3]), ([3, 4], [0, 0])]


def micro_batches(sequences):
    return [{"tokens": sequences(*lengths), "response_lengths": responses} for lengths, responses in RESPONSES]


def policy_step(rows):
    """Return a loss step as the trainer's is: log-probs and entropies of the rows that it is given."""

    def loss_step(logits, batch):
        log_probs, entropies = packed_log_probs_and_entropy(
            logits,
            batch["tokens"],
            batch["response_lengths"],
            0.7,
            entropy=True,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=3,
            rows=rows,
        )
        weights = torch.arange(1.0, len(log_probs) + 1).cos()
        return (log_probs * weights - 0.1 * entropies).sum(), {"rows": len(logits), "log_probs": log_probs.detach()}

    return loss_step


def outcome(model, batches, rows):
    """Return what a step reports and its gradients."""
    results = forward.run(model, batches, policy_step(rows), forward_only=False, rows=rows)
    return results, {name: parameter.main_grad.clone() for name, parameter in model[0].named_parameters()}


def assert_rows_do_not_matter(model, batches):
    every, gradients = outcome(model, batches, "all")
    some, found = outcome(model, batches, "response")
    assert len(every) == len(some) == (3 if init.is_last_stage() else 0)
    assert [result["rows"] for result in some] == [11, 5, 0][: len(some)]
    for one, other in zip(some, every, strict=True):
        torch.testing.assert_close(one["log_probs"], other["log_probs"], rtol=0, atol=1e-6)
    assert any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    observed = forward.run(
        model, batches, lambda logits, batch: (None, policy_step("response")(logits, batch)[1]), forward_only=True,
        rows="response",
    )  # fmt: skip
    for one, other in zip(observed, every, strict=True):
        torch.testing.assert_close(one["log_probs"], other["log_probs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_response_rows_give_the_log_probs_and_gradients_of_all_rows(megatron, hf_dir, sequences, kind):
    assert_rows_do_not_matter(build_model(hf_dir(kind), ParallelOptions()), micro_batches(sequences))


def test_the_output_layer_computes_no_row_of_a_prompt_and_is_left_as_it_was(megatron, hf_dir, sequences):
    model, computed = build_model(hf_dir("qwen3-tied"), ParallelOptions()), []
    head = unwrap(model).output_layer
    watch = head.register_forward_hook(lambda _head, _inputs, outputs: computed.append(len(outputs[0])))
    for rows in ("response", "all"):
        forward.run(model, micro_batches(sequences), lambda *_: (None, {}), forward_only=True, rows=rows)
    watch.remove()
    assert computed == [11, 5, 0, 17, 12, 7]


def test_the_output_layer_is_left_as_it_was_also_after_an_error(megatron, hf_dir, sequences):
    model = build_model(hf_dir("qwen3-tied"), ParallelOptions())
    head = unwrap(model).output_layer
    watch = head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward.run(model, micro_batches(sequences), lambda *_: (None, {}), forward_only=True, rows="response")
    watch.remove()
    [result, *_] = forward.run(
        model, micro_batches(sequences), lambda logits, _: (None, {"n": len(logits)}), forward_only=True
    )
    assert result == {"n": 17}


def test_another_module_in_the_place_of_the_output_layer_gives_its_response_rows(megatron, hf_dir, sequences):
    class Head(torch.nn.Module):
        def forward(self, hidden, weight=None, **_):
            return hidden[..., :2] * 3, None

    model = build_model(hf_dir("qwen3-untied"), ParallelOptions())
    unwrap(model).output_layer = Head()

    def outputs(rows):
        return forward.run(
            model, micro_batches(sequences), lambda out, _: (None, {"out": out.clone()}), forward_only=True, rows=rows
        )

    for batch, some, every in zip(micro_batches(sequences), outputs("response"), outputs("all"), strict=True):
        chosen = response_rows(batch["tokens"], batch["response_lengths"])
        assert some["out"].shape == (len(chosen), 2)
        assert torch.equal(some["out"], every["out"][chosen])


def run_rank(rank, hf_dirs, batches, out, ports):
    for name, layout in LAYOUTS.items():
        parallel = ParallelOptions(actor_num_gpus_per_node=2, **layout)
        init.initialize(parallel, **tiny.meeting(rank, ports), seed=1)
        for kind, directory in hf_dirs.items():
            model = build_model(directory, parallel)
            try:
                assert_rows_do_not_matter(model, batches)
                torch.save(outcome(model, batches, "response")[0], f"{out}/{name}-{kind}-{rank}.pt")
            except AssertionError as error:
                raise AssertionError(f"{name}, {kind}, rank {rank}") from error
        init.shutdown()


def test_response_rows_train_as_all_rows_do_on_two_ranks_and_give_what_one_rank_gives(
    megatron, hf_dir, sequences, tmp_path
):
    directories, batches = {kind: hf_dir(kind) for kind in KINDS}, micro_batches(sequences)
    ports = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, args=(directories, batches, str(tmp_path), ports), nprocs=2)
    for kind, directory in directories.items():
        alone, _ = outcome(build_model(directory, ParallelOptions()), batches, "response")
        for name in LAYOUTS:
            # the last rank is on the last stage in every layout
            for one, other in zip(torch.load(tmp_path / f"{name}-{kind}-1.pt"), alone, strict=True):
                torch.testing.assert_close(one["log_probs"], other["log_probs"], rtol=0, atol=2e-6)
