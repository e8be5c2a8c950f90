"""Calls to processes that hang, fail and die, over a real Ray."""

import ctypes
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from miles_api import stacks
from miles_api.errors import DataError, ServiceError
from miles_train.driver.cluster import _init_ray
from miles_train.driver.remote import Remote, Watch


class Host:
    """A worker of the test: what it does is named by its rank."""

    def __init__(self, rank, name, folder):
        self.rank = rank
        stacks.register(name.replace(" ", "-"), folder)

    def ping(self): ...

    def call(self, method, *args):
        return getattr(self, method)(*args)

    def pid(self):
        return os.getpid()

    def each(self, *what):
        return getattr(self, what[self.rank])()

    def stay(self):
        time.sleep(1000)

    def rank_of(self):
        return self.rank

    def own_error(self):
        error = DataError("no such file")
        error.add_note("in rollout 3")
        raise error

    def other_error(self):
        raise RuntimeError("Connection closed by peer")

    def crash(self):
        ctypes.string_at(0)

    def late_death(self):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ray_here():
    before = signal.getsignal(signal.SIGTERM)
    _init_ray(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    assert signal.getsignal(signal.SIGTERM) == before
    yield
    ray.shutdown()


@pytest.fixture
def make(ray_here, tmp_path):
    """Make a `Remote` of so many processes, and its `Watch`."""
    actors = []

    def made(count=2, watch=None, name="trainer", seconds=60.0):
        watch = watch or Watch(lambda: None, tmp_path)
        host = ray.remote(num_cpus=0)(Host)
        new = {f"{name} {rank}": host.remote(rank, f"{name} {rank}", str(tmp_path)) for rank in range(count)}
        actors.extend(new.values())
        deadline = ("--trainer-timeout", seconds)
        return Remote("train", new, watch, deadline=deadline, stacks=lambda late: f"<{', '.join(late)}>"), watch

    yield made
    for actor in actors:
        ray.kill(actor)


def test_results_come_in_rank_order(make):
    assert make(3)[0].call("rank_of") == [0, 1, 2]


def test_an_error_of_one_rank_ends_the_call_while_the_others_hang(make):
    with pytest.raises(DataError, match="no such file") as caught:
        make()[0].call("each", "stay", "own_error")
    assert caught.value.__notes__ == ["in rollout 3"]


def test_what_is_not_our_error_names_the_rank_and_brings_its_traceback(make):
    with pytest.raises(ServiceError, match=r"train\.each failed in trainer 1") as caught:
        make()[0].call("each", "rank_of", "other_error")
    assert "in other_error" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_death_of_a_rank_is_told_and_not_what_others_saw_of_it(make):
    with pytest.raises(ServiceError, match=r"trainer 1 \(pid \d+\) died during train\.each\n") as caught:
        make()[0].call("each", "other_error", "late_death")
    assert "Connection closed by peer" not in str(caught.value)


def test_a_rank_that_crashes_says_how_and_where_to_read_on(make, tmp_path):
    remote, _ = make()
    pid = remote.call("pid")[1]
    with pytest.raises(ServiceError) as caught:
        remote.call("each", "stay", "crash")
    assert str(caught.value) == (
        f"trainer 1 (pid {pid}) died during train.each\n"
        f"Fatal Python error: Segmentation fault: its stacks are in {tmp_path}/trainer-1-{pid}.txt"
    )
    assert "in crash" in (tmp_path / f"trainer-1-{pid}.txt").read_text()


def test_a_deadline_names_the_flag_the_ranks_and_where_they_are(make):
    remote, _ = make(3, seconds=3.0)
    remote.call("rank_of", timeout=60.0)
    with pytest.raises(ServiceError) as caught:
        remote.call("each", "rank_of", "stay", "stay")
    assert str(caught.value) == (
        "train.each did not return within --trainer-timeout 3 s from trainer 1, trainer 2\n<trainer 1, trainer 2>"
    )
    with pytest.raises(ServiceError, match=r"not called: the process still hangs in train\.each"):
        remote.call("rank_of")


def test_a_call_with_a_deadline_of_its_own_asks_for_no_stacks(make):
    with pytest.raises(ServiceError, match=r"train\.stay did not return within 0\.5 s$"):
        make()[0].call("stay", timeout=0.5)


def test_the_death_of_an_idle_process_ends_a_call_to_another(make):
    idle, watch = make(1, name="rollout")
    busy, _ = make(1, watch)
    (pid,) = idle.call("pid")
    threading.Timer(1.0, os.kill, [pid, signal.SIGKILL]).start()
    with pytest.raises(ServiceError, match=rf"rollout 0 \(pid {pid}\) died during train\.stay"):
        busy.call("stay")


def test_a_problem_elsewhere_ends_a_call(make):
    remote, watch = make(1)
    problems = []
    watch.heed(lambda: problems[0] if problems else None)
    threading.Timer(0.5, problems.append, [ServiceError("no engine is left")]).start()
    with pytest.raises(ServiceError, match="no engine is left"):
        remote.call("stay")


def test_a_problem_does_not_end_calls_that_can_do_without_what_failed(make):
    remote, watch = make(1)
    watch.heed(lambda: ServiceError("no engine is left"), {"stay"})
    assert remote.call("pid")
    with pytest.raises(ServiceError, match="no engine is left"):
        remote.call("stay")


def test_an_interruption_ends_a_call(make, tmp_path):
    asked = []

    def check():
        asked.append(True)
        if len(asked) > 2:
            raise KeyboardInterrupt

    remote, _ = make(1, Watch(check, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        remote.call("stay")


def test_a_process_that_cannot_be_built_ends_the_call_with_its_traceback(ray_here, tmp_path):
    class Broken(Host):
        def __init__(self):
            raise OSError("no space left")

    actor = ray.remote(num_cpus=0)(Broken).remote()
    remote = Remote("train", {"trainer 0": actor}, Watch(lambda: None, tmp_path), deadline=("--x", 60.0), stacks=str)
    with pytest.raises(ServiceError, match="no space left"):
        remote.call("pid")


def test_what_a_failed_run_still_asks_is_not_cut_short_by_the_process_that_failed_it(monkeypatch, tmp_path):
    waits = []

    class SlowAnswer:
        def wait(self, refs, **how):
            waits.append(how)
            return (refs, []) if len(waits) > 1 else ([], refs)

        def get(self, ref):
            return ref

    def dead(doing):
        raise ServiceError(f"trainer 0 died during {doing}")

    monkeypatch.setattr("miles_train.driver.remote.ray", SlowAnswer())
    watch, actor = Watch(lambda: None, tmp_path), SimpleNamespace(call=SimpleNamespace(remote=str))
    remote = Remote("rollout", {"rollout": actor}, watch, deadline=("--x", 60.0), stacks=str)
    watch.look_at_processes = dead
    assert remote.call("report", timeout=5.0) == ["report"]
    waits.clear()
    with pytest.raises(ServiceError, match=r"trainer 0 died during rollout\.report"):
        remote.call("report")
