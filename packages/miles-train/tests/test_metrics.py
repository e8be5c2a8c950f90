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
    gaps = Metrics()
    batch = {
        "tokens": [torch.arange(4)], "loss_masks": [torch.ones(3)], "rollout_log_probs": [torch.zeros(3)],
        "response_lengths": [3], "sample_indices": [rank], "engines": [["a:1"]],
    }  # fmt: skip
    gaps.token_gaps.add(torch.tensor([-0.5, -0.1, -0.2]) - rank, batch)
    gaps.gather(contribute=True)
    torch.save(gaps.token_gaps.report(), f"{out}/gaps-{rank}.pt")
    copies = Metrics()
    copies.token_gaps.add(torch.tensor([-0.5, -0.1, -0.2]), batch)
    copies.gather(contribute=rank == 0)
    torch.save(copies.token_gaps.report(), f"{out}/copies-{rank}.pt")
    metrics = Metrics()
    metrics.add_all({"loss": torch.tensor(1.0 + rank), "gap_max": -3.0 - rank, f"only_{rank}": 7.0})
    torch.save((metrics.gather(contribute=True), metrics.gather(contribute=rank == 1)), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Return the folder of what two ranks have of each other's numbers."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(folder / "store", folder), nprocs=2)
    return folder


def test_every_rank_gets_the_token_gaps_of_all_and_copies_are_not_counted_twice(told):
    for rank in range(2):
        both, copies = torch.load(told / f"gaps-{rank}.pt"), torch.load(told / f"copies-{rank}.pt")
        assert [(source["engine"], source["tokens"], sum(source["bins"])) for source in both["sources"]] == [
            ("a:1", 6, 6)
        ]
        assert [(token["sample"], round(token["gap"], 4)) for token in both["worst"][:4]] == [
            (1, 1.5), (1, 1.2), (1, 1.1), (0, 0.5),
        ]  # fmt: skip
        assert [source["tokens"] for source in copies["sources"]] == [3]


def test_every_rank_gets_the_same_totals_even_of_metrics_it_does_not_have(told):
    for rank in range(2):
        both, only_the_second = torch.load(told / f"{rank}.pt")
        assert both == {"loss": 3.0, "gap_max": -3.0, "only_0": 7.0, "only_1": 7.0}
        assert only_the_second == {"loss": 2.0, "gap_max": -4.0, "only_1": 7.0}


def test_the_clock_adds_up_phases_and_keeps_time_that_ended_in_an_error():
    clock = PhaseClock()
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"), clock.phase("work"):
            raise ValueError("stop")
    assert list(clock.seconds) == ["work"]
    assert clock.seconds["work"] > 0
