"""Training goes on after a load as if it had never stopped."""

import random
import resource

import msgspec
import numpy as np
import pytest
import torch

from miles_api.errors import DataError
from miles_train.megatron import checkpoint, forward
from miles_train.megatron.core import tensor_parallel
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions


def loss_of(logits, batch):
    targets = torch.cat([tokens.roll(-1) for tokens in batch["tokens"]])
    return torch.nn.functional.cross_entropy(logits, targets), {}


SCHEDULE = {"lr": 1e-2, "lr_warmup_iters": 2, "lr_decay_style": "cosine"}


@pytest.fixture(params=[False, True], ids=["plain", "sharded"])
def make_run(request, megatron, hf_dir):
    parallel = ParallelOptions(use_distributed_optimizer=request.param)

    def make(**options):
        model = build_model(hf_dir("qwen3-tied"), parallel)
        return model, build_optimizer(model, OptimizerOptions(**(SCHEDULE | options)), parallel, total_steps=8)

    make.parallel = parallel
    return make


def train(run, sequences, steps):
    model, optimizer = run
    norms = []
    for step in steps:
        forward.run(model, [{"tokens": sequences(4, 9, seed=step)}], loss_of, forward_only=False)
        norms.append((optimizer.learning_rate, optimizer.step()[1]))
    return norms


def test_three_steps_after_a_load_are_bitwise_the_uninterrupted_ones(make_run, sequences, tmp_path):
    uninterrupted = make_run()
    train(uninterrupted, sequences, range(3))
    checkpoint.save(*uninterrupted, str(tmp_path / "saved"))
    resumed = make_run()
    checkpoint.load(*resumed, str(tmp_path / "saved"))
    # the second update after a load is the first that a lost step counter would change
    assert train(resumed, sequences, range(3, 6)) == train(uninterrupted, sequences, range(3, 6))
    assert resumed[1].steps == 6
    for left, right in zip(resumed[0][0].parameters(), uninterrupted[0][0].parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_checkpoint_from_before_the_first_step_can_be_resumed(make_run, sequences, tmp_path):
    uninterrupted = make_run()
    checkpoint.save(*uninterrupted, str(tmp_path / "saved"))
    resumed = make_run()
    train(resumed, sequences, range(10, 12))
    checkpoint.load(*resumed, str(tmp_path / "saved"))
    assert train(resumed, sequences, range(3)) == train(uninterrupted, sequences, range(3))


def test_a_fresh_optimizer_can_be_asked_for(make_run, sequences, tmp_path):
    saved = make_run()
    train(saved, sequences, range(3))
    checkpoint.save(*saved, str(tmp_path / "saved"))
    fresh = saved[0], build_optimizer(saved[0], OptimizerOptions(**SCHEDULE), make_run.parallel, total_steps=8)
    resumed = make_run()
    checkpoint.load(*resumed, str(tmp_path / "saved"), with_optimizer=False)
    assert resumed[1].steps == 0
    assert train(resumed, sequences, range(3)) == train(fresh, sequences, range(3))


def draw():
    """Draw a number from every generator of a rank."""
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return tracked, torch.rand(1).item(), random.random(), np.random.random()


def test_every_generator_goes_on_where_it_was_unless_told_otherwise(make_run, tmp_path):
    run = make_run()
    checkpoint.save(*run, str(tmp_path / "saved"))
    expected, after = draw(), draw()
    checkpoint.load(*run, str(tmp_path / "saved"))
    assert draw() == expected
    checkpoint.load(*run, str(tmp_path / "saved"), with_rng=False)
    assert draw() == after


def test_random_states_that_are_missing_or_of_other_ranks_are_refused_with_a_way_out(make_run, tmp_path):
    run = make_run()
    checkpoint.save(*run, str(tmp_path / "saved"))
    file = tmp_path / "saved" / "random-00000.msgpack"
    content = msgspec.msgpack.decode(file.read_bytes())
    file.write_bytes(msgspec.msgpack.encode(content | {"layout": content["layout"] | {"ranks": 2, "data": 2}}))
    with pytest.raises(DataError, match=r"of ranks 2, tensor 1, pipeline 1, data 2, this run has ranks 1.*no-load-rng"):
        checkpoint.load(*run, str(tmp_path / "saved"))
    file.unlink()
    with pytest.raises(DataError, match=r"random-00000\.msgpack.*--no-load-rng continues with fresh ones"):
        checkpoint.load(*run, str(tmp_path / "saved"))
    checkpoint.load(*run, str(tmp_path / "saved"), with_rng=False)


@pytest.mark.parametrize(("largest", "reason"), [(500, "a file was not taken whole"), (3000, "File too large")])
def test_a_disk_that_takes_no_more_is_one_error_that_names_the_directory(make_run, tmp_path, largest, reason):
    run = make_run()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(DataError) as caught:
            checkpoint.save(*run, str(tmp_path / "saved"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).startswith(f"{tmp_path / 'saved'} cannot be written: ")
    assert reason in str(caught.value)


def test_a_resumed_run_follows_its_own_options(make_run, sequences, tmp_path):
    first = make_run(lr=1e-2, lr_warmup_iters=0, lr_decay_style="constant")
    train(first, sequences, range(2))
    checkpoint.save(*first, str(tmp_path / "saved"))
    second = make_run(lr=3e-3, lr_warmup_iters=0, lr_decay_style="constant", weight_decay=0.5)
    checkpoint.load(*second, str(tmp_path / "saved"))
    assert second[1].learning_rate == 3e-3
    assert {group["weight_decay"] for group in second[1].inner.param_groups} == {0.0, 0.5}


def test_a_directory_without_a_checkpoint_is_refused(make_run, tmp_path):
    with pytest.raises(DataError, match="holds no training checkpoint"):
        checkpoint.load(*make_run(), str(tmp_path))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json"])
def test_a_file_of_the_right_size_and_the_wrong_content_is_called_damaged(make_run, tmp_path, name):
    checkpoint.save(*make_run(), str(tmp_path / "saved"))
    file = tmp_path / "saved" / name
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError, match=r"saved is damaged or does not fit this model: ") as caught:
        checkpoint.load(*make_run(), str(tmp_path / "saved"))
    assert "http" not in str(caught.value)


@pytest.mark.parametrize(("saved", "way_out"), [(True, "with .*: pass it again"), (False, "without .*: leave it out")])
def test_an_optimizer_of_the_other_kind_is_refused_with_its_flag(megatron, hf_dir, tmp_path, saved, way_out):
    def make(sharded):
        parallel = ParallelOptions(use_distributed_optimizer=sharded)
        model = build_model(hf_dir("qwen3-tied"), parallel)
        return model, build_optimizer(model, OptimizerOptions(), parallel, total_steps=1)

    checkpoint.save(*make(saved), str(tmp_path / "saved"))
    with pytest.raises(DataError, match=f"was saved {way_out}, or .* --no-load-optim"):
        checkpoint.load(*make(not saved), str(tmp_path / "saved"))
    checkpoint.load(*make(not saved), str(tmp_path / "saved"), with_optimizer=False)


def test_a_checkpoint_of_another_model_is_refused(megatron, hf_dir, tmp_path):
    parallel = ParallelOptions()

    def make(kind):
        model = build_model(hf_dir(kind), parallel)
        return model, build_optimizer(model, OptimizerOptions(), parallel, total_steps=1)

    checkpoint.save(*make("llama"), str(tmp_path / "saved"))
    with pytest.raises(DataError, match="does not fit this model: "):
        checkpoint.load(*make("qwen3-untied"), str(tmp_path / "saved"))
