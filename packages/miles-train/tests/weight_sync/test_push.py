"""New weights reach every engine, whole, also when engines die; what is left behind is removed."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_train.weight_sync import disk
from miles_train.weight_sync.disk import DiskWay
from miles_train.weight_sync.fixed import FixedWeights
from miles_train.weight_sync.frame import Source

UPDATE = "/update_weights_from_disk"


def folders(engine):
    return [Path(body["model_path"]) for body in engine.requests(UPDATE)]


def in_background(call, *args):
    """Run a call in a thread; return a function that waits for it and gives its result or raises its error."""
    box = []

    def run():
        try:
            box.append((call(*args), None))
        except ServiceError as error:
            box.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(30)
        value, error = box[0]
        if error:
            raise error
        return value

    return result


def wait_for(condition):
    deadline = threading.Event()
    for _ in range(3000):
        if condition():
            return
        deadline.wait(0.01)
    raise AssertionError("it did not happen within 30 s")


def test_every_engine_is_told_the_same_directory_and_version(engines, make_sync):
    make_sync().push(7)
    [first], [second] = (engine.requests(UPDATE) for engine in engines)
    assert first == second
    assert first["weight_version"] == "7"


def test_engines_that_stage_weights_are_paused_when_they_have_read_them(engines, make_sync):
    for engine in engines:
        engine.replies = {"/server_info": (200, {"stages_weights": True})}
    make_sync().push(7)
    steps = ["/begin_weight_update", UPDATE, "/pause_generation", "/end_weight_update", "/continue_generation"]
    for engine in engines:
        assert [path for path in engine.paths() if path in steps] == steps


def test_engines_are_reached_past_a_proxy(engines, make_sync, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    make_sync().push(1)
    assert engines[0].version == "1"


@pytest.mark.parametrize("answer", [(400, {"success": False, "message": "shape"}), (200, {"success": False})])
def test_an_engine_that_does_not_take_the_weights_stops_the_run(engines, make_sync, answer):
    engines[1].answer = answer
    with pytest.raises(ServiceError, match=rf"{engines[1].endpoint.url} refused /update_weights_from_disk"):
        make_sync(patience=60).push(1)


def test_an_engine_that_still_serves_the_old_weights_stops_the_run(engines, make_sync):
    engines[0].stuck_at = "0"
    with pytest.raises(ServiceError, match="took weights '1' but says it serves '0'"):
        make_sync().push(1)


def test_an_engine_that_dies_where_nobody_replaces_it_is_named(engines, make_sync):
    engines[0].dies_at = UPDATE
    with pytest.raises(ServiceError, match=rf"{engines[0].endpoint.url} did not answer /update_weights_from_disk"):
        make_sync().push(1)


def test_the_directory_holds_one_complete_push(engines, trainer, make_sync):
    sync = make_sync()
    sync.push(1)
    sync.push(2)
    old, new = folders(engines[0])
    assert not old.exists()
    trainer.fails = ServiceError("out of memory")
    with pytest.raises(ServiceError, match="out of memory"):
        sync.push(3)
    assert list(new.parent.iterdir()) == [new]
    assert engines[0].version == engines[1].version == "2"


@pytest.mark.parametrize("dies_at", [UPDATE, "/model_info", "/weights_checker", "/generate"])
def test_a_push_waits_for_the_engine_that_replaces_one_that_dies_in_it(engines, new_engine, make_sync, dies_at):
    sync, newcomer = make_sync(patience=60), new_engine()
    engines[0].dies_at = dies_at
    pushed = in_background(sync.push, 1)
    wait_for(lambda: engines[0].dies_at == "everywhere")
    sync.replace(engines[0].endpoint, newcomer.endpoint)
    sync.bring(newcomer.endpoint)
    assert pushed()["sync/checked"] == 2
    assert newcomer.version == engines[1].version == "1"
    assert len(newcomer.requests(UPDATE)) == len(engines[1].requests(UPDATE)) == 1
    sync.push(2)
    assert newcomer.version == "2"


def test_a_replacement_that_dies_too_is_replaced_in_the_same_push(engines, new_engine, make_sync):
    sync, second, third = make_sync(patience=60), new_engine(), new_engine()
    engines[0].dies_at = second.dies_at = UPDATE
    pushed = in_background(sync.push, 1)
    wait_for(lambda: engines[0].dies_at == "everywhere")
    sync.replace(engines[0].endpoint, second.endpoint)
    wait_for(lambda: second.dies_at == "everywhere")
    sync.replace(second.endpoint, third.endpoint)
    pushed()
    assert third.version == "1"


def test_an_engine_that_comes_back_at_the_port_of_the_one_it_replaces_is_another_engine(engines, make_sync):
    sync, url = make_sync(patience=60), engines[0].endpoint.url
    engines[0].dies_at = UPDATE
    pushed = in_background(sync.push, 1)
    wait_for(lambda: engines[0].dies_at == "everywhere")
    engines[0].dies_at = None
    sync.replace(engines[0].endpoint, Endpoint(url=url))
    pushed()
    assert engines[0].version == "1"


def test_a_push_ends_with_the_reason_why_nothing_is_replaced_any_more(engines, make_sync):
    sync = make_sync(patience=60)
    engines[0].dies_at = UPDATE
    pushed = in_background(sync.push, 1)
    wait_for(lambda: engines[0].dies_at == "everywhere")
    sync.give_up(ServiceError("engine 0 died three times"))
    with pytest.raises(ServiceError, match="died three times"):
        pushed()


def test_a_push_does_not_wait_for_ever(engines, make_sync):
    engines[0].dies_at = UPDATE
    with pytest.raises(ServiceError, match=r"did not answer .*, and nothing took its place within 0\.01 s"):
        make_sync(patience=0.01).push(1)


def test_a_new_engine_gets_the_last_push_and_is_verified_as_that_was(engines, new_engine, make_sync):
    sync, newcomer, wrong = make_sync(), new_engine(), new_engine()
    sync.bring(newcomer.endpoint)
    assert newcomer.seen == []
    sync.push(1)
    sync.bring(newcomer.endpoint)
    assert newcomer.version == "1"
    wrong.log_prob = -2.0
    with pytest.raises(ServiceError, match=wrong.endpoint.url):
        sync.bring(wrong.endpoint)


def test_a_new_engine_that_dies_again_is_an_error_at_once(engines, new_engine, make_sync):
    sync, newcomer = make_sync(patience=60), new_engine()
    sync.push(1)
    newcomer.dies_at = UPDATE
    with pytest.raises(ServiceError, match="did not answer"):
        sync.bring(newcomer.endpoint)


def test_the_push_after_a_replacement_is_checked_whatever_the_interval(engines, new_engine, make_sync):
    sync, newcomer = make_sync(weight_check_interval=100), new_engine()
    sync.push(1)
    assert sync.push(2) == {}
    sync.replace(engines[0].endpoint, newcomer.endpoint)
    sync.bring(newcomer.endpoint)
    assert sync.push(3)["sync/checked"] == 2
    sync.bring(newcomer.endpoint)
    assert len(newcomer.requests(UPDATE)) == 2
    assert sync.push(4) == {}


def test_weights_that_nobody_trains_are_known_by_what_the_engines_call_them(engines):
    fixed = FixedWeights([engine.endpoint for engine in engines])
    assert fixed.push(3) == {}
    assert fixed.served(3) == "default"
    assert engines[0].requests(UPDATE) == []


def test_weights_that_engines_give_no_name_have_none_and_every_engine_may_serve(engines):
    for engine in engines:
        engine.version = None
    fixed = FixedWeights([engine.endpoint for engine in engines])
    assert fixed.served(3) == ""  # what a router takes for no requirement
    fixed.bring(engines[0].endpoint)


def test_weights_travel_in_memory_only_where_they_fit(tmp_path, monkeypatch):
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(disk, "_SHARED_MEMORY", memory)
    free = shutil.disk_usage(memory).free
    assert disk.make_folder(1, None, fallback=tmp_path).parent == memory
    assert disk.make_folder(free, None, fallback=tmp_path).parent == tmp_path
    assert disk.make_folder(1, tmp_path, fallback=memory).parent == tmp_path


def test_what_a_killed_run_left_in_memory_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_SHARED_MEMORY", tmp_path)
    dead = tmp_path / "miles-weights-999999999-abc"
    alive = tmp_path / f"miles-weights-{os.getpid()}-abc"
    dead.mkdir()
    alive.mkdir()
    disk.make_folder(1, None, fallback=tmp_path / "run")
    assert not dead.exists()
    assert alive.exists()


def test_the_weights_of_a_run_whose_process_cannot_be_seen_from_here_are_left_alone(tmp_path, trainer, monkeypatch):
    # Containers may share this memory and not their process ids.
    monkeypatch.setattr(disk, "_SHARED_MEMORY", tmp_path)
    elsewhere = tmp_path / "miles-weights-999999999-abc"
    elsewhere.mkdir()
    source = Source(export=trainer.export, score=trainer.score, tokens=[])
    way = DiskWay(source, elsewhere, "retract")
    disk.make_folder(1, None, fallback=tmp_path / "run")
    assert elsewhere.exists()
    way.close()
    assert not elsewhere.exists()


def test_what_a_killed_start_left_in_the_directory_of_this_run_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_SHARED_MEMORY", tmp_path / "shm")
    left = tmp_path / "run" / f"miles-weights-{os.getpid()}-abc"
    left.mkdir(parents=True)
    made = disk.make_folder(1, None, fallback=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [made]
    shared = disk.make_folder(1, tmp_path / "run", fallback=tmp_path)
    assert list((tmp_path / "run").iterdir()) == [shared]
