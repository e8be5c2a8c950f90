"""The CPU shims: applied once, pinned, and harmless to others."""

import functools
import importlib.metadata

import pytest
import torch

from miles_api.errors import ConfigError
from miles_train.megatron import cpu

pytestmark = pytest.mark.skipif(cpu.has_gpu(), reason="the shims are for machines without a GPU")


def test_the_installed_megatron_is_the_one_the_shims_were_written_against():
    assert importlib.metadata.version("megatron-core") == cpu.MEGATRON_VERSION


def test_another_megatron_version_is_refused_with_both_versions_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.99.0")
    monkeypatch.setattr(cpu, "_apply", functools.cache(cpu._apply.__wrapped__))
    with pytest.raises(ConfigError, match=r"0\.16\.1, installed is 0\.99\.0"):
        cpu.apply_cpu_shims()


def test_applying_the_shims_twice_changes_nothing_the_second_time():
    cpu.apply_cpu_shims()
    before = torch.zeros, torch.Tensor.type, torch.cuda.Stream
    cpu.apply_cpu_shims()
    assert (torch.zeros, torch.Tensor.type, torch.cuda.Stream) == before


def test_what_asks_for_the_current_gpu_gets_the_cpu():
    cpu.apply_cpu_shims()
    tensor = torch.zeros(2, device=torch.cuda.current_device())
    assert tensor.device.type == "cpu"
    assert torch.ones(2, device="cuda").device.type == "cpu"
    assert tensor.cuda() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.type(torch.int64).dtype == torch.int64


def test_building_a_model_on_the_meta_device_still_allocates_nothing():
    cpu.apply_cpu_shims()
    with torch.device("meta"):
        assert torch.zeros(3).is_meta
        assert torch.nn.Linear(3, 3).weight.is_meta
