from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_api.checksum import checksums
from miles_rollout.engines.local.errors import CheckpointError
from miles_rollout.engines.local.weights import check_model_dir
from miles_rollout.engines.protocol import VersionSpan


@pytest.mark.parametrize("impl", ["lean", "hf"])
def test_an_update_gives_what_a_fresh_engine_gives_and_forgets_old_prompts(kit, make_job, drain, prompts, impl):
    scheduler = kit.scheduler(impl=impl)
    drain(scheduler, old := make_job(prompts[0]))
    scheduler.swap_weights(scheduler.model.stage(kit.directory("qwen3", seed=1)), "7")
    drain(scheduler, new := make_job(prompts[0], max_new_tokens=20))
    drain(kit.scheduler(impl=impl, seed=1), fresh := make_job(prompts[0], max_new_tokens=20))
    assert new.output_ids == fresh.output_ids
    assert new.logprobs == fresh.logprobs
    assert new.output_ids[:8] != old.output_ids
    assert new.cached_tokens == 0
    assert old.version_spans(8) == [VersionSpan(version="default", start=0, end=8)]
    assert new.version_spans(20) == [VersionSpan(version="7", start=0, end=20)]


def test_a_job_that_runs_across_an_update_goes_on_and_names_both_versions(kit, make_job, drain, prompts):
    scheduler = kit.scheduler()
    scheduler.add(job := make_job(prompts[0], max_new_tokens=10))
    for _ in range(3):
        scheduler.step()
    before = len(scheduler.batch.jobs)
    scheduler.swap_weights(scheduler.model.stage(kit.directory("qwen3", seed=1)), "2")
    drain(scheduler)
    assert before == 1
    assert job.version_spans(10) == [
        VersionSpan(version="default", start=0, end=4),
        VersionSpan(version="2", start=4, end=10),
    ]


def test_a_job_retracted_for_an_update_is_computed_anew_with_the_new_weights(kit, make_job, drain, prompts):
    scheduler = kit.scheduler()
    scheduler.add(job := make_job(prompts[0], max_new_tokens=10))
    scheduler.step()
    scheduler.pause("retract")
    scheduler.swap_weights(scheduler.model.stage(kit.directory("qwen3", seed=1)), "2")
    scheduler.resume()
    drain(scheduler)
    prefix = job.ids + job.output_ids[:2]
    drain(kit.scheduler(seed=1), fresh := make_job(prefix, max_new_tokens=8))
    assert job.output_ids[2:] == fresh.output_ids
    assert [span.version for span in job.version_spans(10)] == ["default", "2"]


def damaged(kit, tmp_path, change):
    shutil.copytree(kit.directory("qwen3", seed=1), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return tmp_path
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "unexpected":
        tensors["model.extra.weight"] = torch.zeros(2)
    else:
        tensors["model.norm.weight"] = torch.zeros(33)
    save_file(tensors, file, {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("impl", ["lean", "hf"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "truncated"])
def test_an_update_that_does_not_fit_leaves_the_live_weights(kit, make_job, drain, prompts, tmp_path, change, impl):
    scheduler = kit.scheduler(impl=impl)
    before = checksums(scheduler.model.tensors())
    with pytest.raises(CheckpointError, match=r"norm\.weight|extra\.weight|safetensors|cannot"):
        scheduler.model.stage(damaged(kit, tmp_path, change))
    assert checksums(scheduler.model.tensors()) == before


def test_weights_in_several_files_load_as_one(kit, make_job, drain, prompts, tmp_path):
    shutil.copytree(kit.directory("qwen3"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    kit.reference("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    scheduler = kit.scheduler()
    before = checksums(scheduler.model.tensors())
    scheduler.model.stage(tmp_path)()
    assert checksums(scheduler.model.tensors()) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_without_a_needed_file_is_refused_by_its_name(kit, tmp_path, name):
    shutil.copytree(kit.directory("qwen3"), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        check_model_dir(str(tmp_path))
