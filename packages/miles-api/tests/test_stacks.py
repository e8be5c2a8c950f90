import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from miles_api import stacks

HANG = """
import sys, threading, time
from miles_api import stacks

stacks.register(sys.argv[1], sys.argv[2])

def lock_up():
    lock = threading.Lock()
    with lock:
        print("ready", flush=True)
        lock.acquire()

threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
lock_up()
"""


@contextmanager
def hanging(name, directory, program=HANG):
    process = subprocess.Popen([sys.executable, "-c", program, name, directory], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_process_that_waits_for_a_lock_for_ever_tells_where(tmp_path):
    with hanging("trainer-1", tmp_path) as process:
        found = stacks.collect(tmp_path)
        assert process.poll() is None
    (name,) = found
    assert name == f"trainer-1-{process.pid}"
    assert found[name].count("most recent call first") == 2
    (frame,) = stacks.innermost_frames(found[name], 1)
    assert frame.endswith(" in lock_up")
    assert (tmp_path / f"{name}.txt").read_text() == found[name]


def test_a_second_look_tells_the_second_stack_alone(tmp_path):
    with hanging("rollout", tmp_path):
        first, second = stacks.collect(tmp_path), stacks.collect(tmp_path)
    # Two threads each time.
    assert [text.count("most recent call first") for text in (*first.values(), *second.values())] == [2, 2]


def test_a_stopped_process_is_told_of_with_an_empty_text(tmp_path):
    with hanging("engine", tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        assert stacks.collect(tmp_path) == {f"engine-{process.pid}": ""}


def test_a_process_that_merely_has_the_id_of_one_that_ended_is_not_signalled(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as other:
        (tmp_path / f"engine-{other.pid}.txt").touch()
        assert stacks.collect(tmp_path) == {}
        other.communicate("\n")
    assert other.returncode == 0


def test_a_crash_is_written_to_the_file(tmp_path):
    crash = "import sys, ctypes; from miles_api import stacks; stacks.register(*sys.argv[1:]); ctypes.string_at(0)"
    ended = subprocess.run([sys.executable, "-c", crash, "trainer-0", tmp_path], check=False)
    assert ended.returncode == -signal.SIGSEGV
    (file,) = tmp_path.iterdir()
    assert "Segmentation fault" in file.read_text()


def test_processes_started_in_the_block_find_the_directory_and_leave_nothing_if_all_went_well(tmp_path, monkeypatch):
    monkeypatch.delenv(stacks.VARIABLE, raising=False)
    folder = tmp_path / "stacks"
    with stacks.kept_in(folder):
        program = "import os; from miles_api import stacks; stacks.register('router'); print(len(os.listdir()))"
        folder.mkdir()
        words = [sys.executable, "-c", program]
        ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        assert ended.stdout == "1\n"
    assert not folder.exists()
    assert stacks.VARIABLE not in os.environ


def test_what_was_written_in_the_block_stays(tmp_path):
    with stacks.kept_in(tmp_path / "stacks"), hanging("engine", tmp_path / "stacks") as process:
        (tmp_path / "stacks" / "rollout-1.txt").touch()
        stacks.collect(tmp_path / "stacks")
    assert [file.name for file in (tmp_path / "stacks").iterdir()] == [f"engine-{process.pid}.txt"]


def test_outside_of_a_run_registering_does_nothing(monkeypatch):
    monkeypatch.delenv(stacks.VARIABLE, raising=False)
    stacks.register("engine")
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


@pytest.mark.parametrize("text", ["", "Fatal Python error: Aborted\n"])
def test_a_text_without_stacks_has_no_frames(text):
    assert stacks.innermost_frames(text, 3) == []
