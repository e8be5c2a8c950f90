"""Adding up metrics over parts and ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles_train.metrics import Metrics, PhaseClock


def test_parts_add_up_and_maxima_keep_the_largest():
    metrics = Metrics()
    for value in (torch.tensor(-1.0), 2.0, torch.tensor(0.5)):
        metrics.add_all({"loss": value, "ratio_max": value})
    assert metrics.gather(contribute=True) == {"loss": 1.5, "ratio_max": 2.0}
    assert metrics.gather(contribute=False) == {}
    assert Metrics().gather(contribute=True) == {}


def _rank(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metrics = Metrics()
    metrics.add_all({"loss": torch.tensor(1.0 + rank), "gap_max": -3.0 - rank, f"only_{rank}": 7.0})
    torch.save((metrics.gather(contribute=True), metrics.gather(contribute=rank == 1)), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_gets_the_same_totals_even_of_metrics_it_does_not_have(tmp_path):
    mp.spawn(_rank, args=(tmp_path / "store", tmp_path), nprocs=2)
    for rank in range(2):
        both, only_the_second = torch.load(tmp_path / f"{rank}.pt")
        assert both == {"loss": 3.0, "gap_max": -3.0, "only_0": 7.0, "only_1": 7.0}
        assert only_the_second == {"loss": 2.0, "gap_max": -4.0, "only_1": 7.0}


def test_the_clock_adds_up_phases_and_keeps_time_that_ended_in_an_error():
    clock = PhaseClock()
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"), clock.phase("work"):
            raise ValueError("stop")
    assert list(clock.seconds) == ["work"]
    assert clock.seconds["work"] > 0
