import os
import signal
import sys
from types import SimpleNamespace

import pytest
import ray
from ray._private.worker import print_worker_logs

from miles_api.errors import ServiceError
from miles_train.driver import cluster, room
from miles_train.driver.layout import Layout


def test_a_sigterm_that_comes_while_ray_has_it_still_reaches_the_run(monkeypatch):
    came = []

    def own(signum, frame):
        came.append(signum)

    def init(**options):
        # As Ray does at the end of its start.
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the handler ends the process")

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, own)
    try:
        cluster._init_ray(address="local")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_rays_prefix_has_colours_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("RAY_COLOR_PREFIX", None)
    monkeypatch.setattr(ray, "init", lambda: None)
    line = {"pid": 7, "ip": "127.0.0.1", "job": "", "is_err": False, "actor_name": "rank-0", "lines": ["hello"]}
    shown = []
    for is_terminal in (True, False):
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
        cluster._init_ray()
        print_worker_logs(line, sys.stdout)
        shown.append(capsys.readouterr().out)
    assert [("hello" in text, "\x1b[" in text) for text in shown] == [(True, True), (True, False)]


@pytest.fixture
def cluster_of(monkeypatch):
    """Give Ray these resources on one node; a placement group is the list of its bundles."""

    def make(cpus, gpus=0):
        resources = {"CPU": cpus, "GPU": gpus}
        group = SimpleNamespace(wait=lambda seconds: True)
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
        monkeypatch.setattr(
            room,
            "PlacementGroupSchedulingStrategy",
            lambda _, placement_group_bundle_index: placement_group_bundle_index,
        )
        asked = []

        def placement_group(bundles, strategy):
            asked.extend(bundles)
            return group

        monkeypatch.setattr(room, "placement_group", placement_group)
        return asked

    return make


@pytest.mark.parametrize(("cpus", "gpus"), [(2, 0), (9, 1)])
def test_a_cluster_that_is_too_small_is_refused_with_both_numbers(cluster_of, cpus, gpus):
    cluster_of(cpus, gpus)
    with pytest.raises(ServiceError, match=rf"has {cpus} CPUs and {gpus} GPUs; the run needs .* 2 trainer ranks"):
        room.Room(Layout(trainer_nodes=1, trainer_slots=2), engines_too=False)


def test_engines_have_slots_of_their_own_beside_the_trainers(cluster_of):
    bundles = cluster_of(32, 16)
    layout = Layout(trainer_nodes=2, trainer_slots=4, engines=2, engine_slots=4, engines_use_gpus=True)
    seats = room.Room(layout, engines_too=True)
    assert bundles == [{"CPU": 4, "GPU": 4}] * 4
    assert [seats.of_rank(rank)["scheduling_strategy"] for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]
    for engine in range(2):
        [seat] = seats.seats(engine, [])
        assert (seat.resources["num_gpus"], seat.resources["scheduling_strategy"], seat.gpu_ids) == (
            4,
            2 + engine,
            None,
        )


def test_engines_that_share_the_trainers_gpus_take_them_in_the_order_of_the_ranks(cluster_of):
    bundles = cluster_of(32, 8)
    layout = Layout(trainer_nodes=2, trainer_slots=4, engines=4, engine_slots=2, shared=True, engines_use_gpus=True)
    seats = room.Room(layout, engines_too=True)
    ranks = [(3,), (2,), (1,), (0,), (0,), (1,), (2,), (3,)]
    found = [seats.seats(engine, ranks) for engine in range(4)]
    assert bundles == [{"CPU": 4, "GPU": 4}] * 2
    assert [seat.gpu_ids for [seat] in found] == [(3, 2), (1, 0), (0, 1), (2, 3)]
    assert [seat.resources["scheduling_strategy"] for [seat] in found] == [0, 0, 1, 1]


def test_an_engine_larger_than_a_node_has_a_part_on_each_of_several(cluster_of):
    cluster_of(32, 8)
    layout = Layout(trainer_nodes=2, trainer_slots=4, engines=1, engine_slots=8, shared=True, engines_use_gpus=True)
    seats = room.Room(layout, engines_too=True).seats(0, [(rank % 4,) for rank in range(8)])
    assert [seat.gpu_ids for seat in seats] == [(0, 1, 2, 3)] * 2
    assert [seat.resources["scheduling_strategy"] for seat in seats] == [0, 1]


def test_engines_without_gpus_may_be_on_any_node(cluster_of):
    bundles = cluster_of(8)
    room.Room(Layout(trainer_nodes=1, trainer_slots=1, engines=1), engines_too=True)
    assert bundles == [{"CPU": 1}, {"CPU": 1}]
