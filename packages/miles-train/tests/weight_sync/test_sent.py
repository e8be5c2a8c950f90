"""Weights that the trainer sends itself: sessions, engines that die in one, and engines that come in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_train.options import WeightSyncOptions
from miles_train.weight_sync.frame import Source, WeightSync
from miles_train.weight_sync.link import in_buckets
from miles_train.weight_sync.plan import Sent
from miles_train.weight_sync.sent import SentWay

from .conftest import SUMS, TOKENS
from .test_push import in_background, wait_for

BEGIN, END, PAUSE, CONTINUE = (
    f"/{name}" for name in ("begin_weight_update", "end_weight_update", "pause_generation", "continue_generation")
)


class SendingTrainer:
    """Gives every engine it is told of the version; `dead` die in it, and `says` is its answer to the first plan."""

    def __init__(self, engines, scores):
        self.engines, self.score, self.plans = engines, scores, []
        self.refused, self.dead, self.holds = {}, [], None

    def send(self, plan):
        self.plans.append(plan)
        told = {receiver.url for receiver in plan.receivers}
        dead = [engine for engine in self.dead if engine.endpoint.url in told]
        for engine in self.engines:
            if engine.endpoint.url in told and engine not in dead:
                engine.version = plan.version
        for engine in dead:
            engine.dies_at = "everywhere"
        self.holds = plan.version
        sums = dict(SUMS) if plan.hashed else {}
        return Sent(gone={e.endpoint.url: "died" for e in dead}, refused=self.refused, checksums=sums, dtype="float32")

    def snapshot(self, directory, version):
        Path(directory, "config.json").write_text("{}")
        return version == self.holds


@pytest.fixture
def sending(engines, trainer):
    return SendingTrainer(list(engines), trainer.score)


@pytest.fixture
def make_sync(engines, sending, tmp_path):
    made = []

    def make(how="tensor", patience=0.0, **options):
        folder = tmp_path / f"snapshots{len(made)}"
        folder.mkdir()
        source = Source(None, sending.score, TOKENS, sending.send, sending.snapshot)
        options = WeightSyncOptions(**options)
        way = SentWay(how, source, folder, options)
        made.append(WeightSync(way, source, [one.endpoint for one in engines], options, patience=patience))
        return made[-1]

    yield make
    for sync in made:
        sync.close()


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_an_engine_is_paused_from_before_its_session_until_all_weights_are_there(engines, sending, make_sync, mode):
    assert make_sync(pause_generation_mode=mode).push(3)["sync/checked_tensors"] == len(SUMS)
    for engine in engines:
        order = [path for path in engine.paths() if path in (BEGIN, END, PAUSE, CONTINUE)]
        assert order == [PAUSE, BEGIN, END, CONTINUE]
        assert engine.requests(PAUSE) == [{"mode": mode}]
    [plan] = sending.plans
    assert plan.flush is (mode != "in_place")


def test_engines_that_stage_weights_are_paused_when_they_have_them_all(engines, make_sync):
    for engine in engines:
        engine.replies = {"/server_info": (200, {"stages_weights": True})}
    sync = make_sync()
    sync.push(3)
    sync.push(4)
    for engine in engines:
        order = [path for path in engine.paths() if path in (BEGIN, END, PAUSE, CONTINUE)]
        assert order == [BEGIN, PAUSE, END, CONTINUE] * 2


def test_an_engine_beside_one_that_stages_nothing_is_paused_for_all_of_it(engines, make_sync):
    engines[1].replies = {"/server_info": (200, {"stages_weights": True})}
    make_sync().push(3)
    for engine in engines:
        order = [path for path in engine.paths() if path in (BEGIN, END, PAUSE, CONTINUE)]
        assert order == [PAUSE, BEGIN, END, CONTINUE]


def test_engines_that_stage_weights_go_on_with_the_old_ones_when_new_ones_do_not_arrive(engines, sending, make_sync):
    for engine in engines:
        engine.replies = {"/server_info": (200, {"stages_weights": True})}
    sending.refused = {engines[1].endpoint.url: "shape mismatch"}
    with pytest.raises(
        ServiceError, match=rf"the engines keep the old ones.*{engines[1].endpoint.url}: shape mismatch"
    ):
        make_sync().push(1)
    assert not any(path in (END, PAUSE) for engine in engines for path in engine.paths())


def test_an_engine_that_knows_no_sessions_gets_the_weights_without(engines, make_sync):
    for engine in engines:
        engine.replies = {BEGIN: (404, {}), END: (404, {})}
    make_sync().push(1)
    assert {engine.version for engine in engines} == {"1"}


def test_a_session_that_a_killed_run_left_open_is_closed_first(engines, make_sync):
    class Answers(dict):
        def __getitem__(self, path):
            first = engines[0].paths().count(BEGIN) == 1
            return (400, {"message": "a weight-update session is already open"}) if first else (200, {"success": True})

    engines[0].replies = Answers({BEGIN: None})
    make_sync().push(1)
    # Paused, as what the killed run had sent may be half of an update.
    order = [path for path in engines[0].paths() if path in (BEGIN, END, PAUSE)]
    assert order == [PAUSE, BEGIN, END, BEGIN, END]


def test_half_of_an_update_that_a_killed_run_staged_is_dropped_and_never_served(engines, sending, make_sync):
    class Answers(dict):
        def __getitem__(self, path):
            if path == "/server_info":
                return 200, {"stages_weights": True}
            first = engines[0].paths().count(BEGIN) == 1
            return (400, {"message": "a weight-update session is already open"}) if first else (200, {"success": True})

    engines[0].replies = Answers({BEGIN: None, "/server_info": None})
    engines[1].replies = {"/server_info": (200, {"stages_weights": True})}
    # Also where the new weights do not arrive either.
    sending.refused = {engines[1].endpoint.url: "shape mismatch"}
    with pytest.raises(ServiceError, match="keep the old ones"):
        make_sync().push(1)
    assert engines[0].requests(BEGIN) == [{}, {"anew": True}]
    assert not any(path in (END, PAUSE) for path in engines[0].paths())


def test_an_engine_that_started_anew_at_its_address_within_a_push_gets_it_again(engines, make_sync):
    class Answers(dict):
        def __getitem__(self, path):
            first = engines[0].paths().count(END) == 1
            problem = "no weight-update session is open; call begin_weight_update() first"
            return (400, {"success": False, "message": problem}) if first else (200, {"success": True})

    engines[0].replies = Answers({END: None})
    sync = make_sync(patience=60)
    pushed = in_background(sync.push, 1)
    wait_for(lambda: engines[1].requests(CONTINUE))
    assert not engines[0].requests(CONTINUE)
    sync.replace(engines[0].endpoint, Endpoint(url=engines[0].endpoint.url))
    assert pushed()["sync/checked"] == 2
    assert [path for path in engines[0].paths() if path in (BEGIN, END, CONTINUE)] == [BEGIN, END] * 2 + [CONTINUE]


def test_engines_stay_paused_when_one_does_not_take_the_weights(engines, sending, make_sync):
    sending.refused = {engines[1].endpoint.url: "shape mismatch"}
    with pytest.raises(ServiceError, match=rf"the engines stay paused.*{engines[1].endpoint.url}: shape mismatch"):
        make_sync().push(1)
    assert not any(engine.requests(CONTINUE) for engine in engines)


def test_engines_that_cannot_finish_the_update_stay_paused(engines, make_sync):
    engines[0].replies = {END: (400, {"success": False, "message": "2 tensors are missing"})}
    with pytest.raises(ServiceError, match="2 tensors are missing"):
        make_sync().push(1)
    assert not engines[0].requests(CONTINUE)


@pytest.mark.parametrize(("how", "sendings"), [("tensor", 1), ("broadcast", 2)])
def test_a_death_in_a_broadcast_sends_everything_to_the_others_again(
    engines, new_engine, sending, make_sync, how, sendings
):
    sync, newcomer = make_sync(how, patience=60), new_engine()
    sending.engines.append(newcomer)
    sending.dead = [engines[0]]
    pushed = in_background(sync.push, 1)
    wait_for(lambda: engines[1].requests(CONTINUE))
    urls = [sorted(receiver.url for receiver in plan.receivers) for plan in sending.plans]
    both, left = sorted(engine.endpoint.url for engine in engines), [engines[1].endpoint.url]
    assert urls == [both, left][:sendings]
    sync.replace(engines[0].endpoint, newcomer.endpoint)
    assert pushed()["sync/checked"] == 2
    assert newcomer.version == engines[1].version == "1"


def test_a_new_engine_reads_a_snapshot_of_weights_that_the_trainer_still_has(engines, new_engine, make_sync):
    sync, first, second = make_sync(), new_engine(), new_engine()
    sync.push(1)
    sync.bring(first.endpoint)
    sync.bring(second.endpoint)
    [body] = first.requests("/update_weights_from_disk")
    assert second.requests("/update_weights_from_disk") == [body]
    assert body["weight_version"] == first.version == second.version == "1"
    assert Path(body["model_path"]).is_dir()
    sync.push(2)
    assert not Path(body["model_path"]).exists()


def test_a_new_engine_waits_for_the_next_push_if_the_trainer_has_trained(engines, new_engine, sending, make_sync):
    sync, newcomer = make_sync(), new_engine()
    sending.engines.append(newcomer)
    sync.push(1)
    sending.holds = None
    sync.replace(engines[0].endpoint, newcomer.endpoint)
    brought = in_background(sync.bring, newcomer.endpoint)
    wait_for(sync.awaiting)
    sync.push(2)
    # At once: whoever made the push goes on, and must not take it for one that still waits.
    assert not sync.awaiting()
    brought()
    assert newcomer.version == "2"
    assert not newcomer.requests("/update_weights_from_disk")


def test_a_new_engine_that_waits_hears_when_the_run_gives_up(engines, new_engine, sending, make_sync):
    sync, newcomer = make_sync(), new_engine()
    sync.push(1)
    sending.holds = None
    sync.replace(engines[0].endpoint, newcomer.endpoint)
    brought = in_background(sync.bring, newcomer.endpoint)
    sync.give_up(ServiceError("engine 0 died three times"))
    with pytest.raises(ServiceError, match="died three times"):
        brought()


def test_a_new_engine_that_gets_the_push_in_which_the_last_one_died_waits_for_no_other(
    engines, new_engine, sending, make_sync
):
    del engines[1]
    sync, newcomer = make_sync(patience=60), new_engine()
    sending.engines.append(newcomer)
    # It dies before anything was sent, so the trainer does not know this version yet.
    engines[0].dies_at = PAUSE

    def take_place():
        wait_for(lambda: engines[0].dies_at == "everywhere")
        sync.replace(engines[0].endpoint, newcomer.endpoint)
        sync.bring(newcomer.endpoint)

    brought = in_background(take_place)
    assert sync.push(1)["sync/checked"] == 1
    brought()
    assert newcomer.version == "1"


def test_tensors_of_one_dtype_share_buckets_in_their_order():
    sizes = [4, 4, 100, 4, 4]
    named = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    named.append(("5", torch.zeros(2, dtype=torch.float32)))
    buckets = [[name for name, _ in bucket.tensors] for bucket in in_buckets(named, 10)]
    assert buckets == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    packed = torch.empty(8, dtype=torch.uint8)
    next(in_buckets([("a", torch.arange(2.0))], 10)).pack(packed)
    assert packed.view(torch.float32).tolist() == [0.0, 1.0]
