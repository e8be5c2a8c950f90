"""What a program in the sandbox can use up."""

import pytest

from .conftest import QUICK, attempt, needs_sandbox, outcomes

pytestmark = needs_sandbox


def test_more_processes_than_allowed_end_all_of_them(marked):
    line, alive = marked
    code = line + f"import os, time\nfor _ in range({2 * QUICK.processes}):\n  if os.fork() == 0: break\ntime.sleep(4)"
    # The kernel refuses the fork, or process 1 sees them.
    [outcome] = outcomes(code)
    assert outcome.cause == "processes" or outcome.exit_code == 1
    assert alive() == 0


def test_memory_of_one_process_is_bounded():
    assert attempt("bytearray(300 << 20)", "bytearray(100 << 20)") == ["MemoryError", "nothing"]


def test_memory_of_all_processes_together_is_bounded(marked):
    line, alive = marked
    code = (
        line + "import os, time\nfor _ in range(5):\n  if os.fork() == 0: break\nx = b'x' * (90 << 20)\ntime.sleep(4)"
    )
    [outcome] = outcomes(code)
    assert outcome.cause == "memory"
    assert alive() == 0


def test_memory_that_no_process_is_seen_to_use_cannot_be_had():
    take_and_give_back = "import mmap; m = mmap.mmap({}); m.write(b'x'); m.madvise(mmap.MADV_DONTNEED)"
    assert attempt(
        "os.write(os.memfd_create('held'), b'x')",
        take_and_give_back.format("-1, 4096"),
        "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)",
        "assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
        "assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
        take_and_give_back.format("os.open('/dev/zero', os.O_RDWR), 4096"),
    ) == ["PermissionError"] * 3 + ["AssertionError"] * 2 + ["FileNotFoundError"]
    # What programs do need: memory of their own, and of files, which are bounded.
    assert (
        attempt(
            "import mmap; mmap.mmap(-1, 4096, mmap.MAP_PRIVATE)",
            "open('f', 'wb').write(bytes(4096)); import mmap; mmap.mmap(os.open('f', os.O_RDWR), 4096)",
            "import multiprocessing as m; v = m.get_context('fork').Value('i', 3); assert v.value == 3",
        )
        == ["nothing"] * 3
    )


def test_endless_output_is_cut_and_stopped():
    [outcome] = outcomes("for _ in range(100_000): print('x' * 1000)")
    assert outcome.cause == "output"
    assert len(outcome.stdout) == QUICK.output_kib * 1024


def test_files_are_bounded_one_by_one_and_together():
    many = "for i in range(8):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))"
    assert attempt(many) == "OSError"
    assert attempt("open('one', 'wb').write(bytes(5 << 20))") == "OSError"
    both = "for path in ('/tmp/x', '/dev/shm/y'):\n    with open(path, 'wb') as f: f.write(bytes(5 << 19))"
    assert attempt(both) == "OSError"


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(20)"])
def test_time_is_bounded(code):
    [outcome] = outcomes(code, limits=QUICK._replace(seconds=0.5))
    assert outcome.cause == "time"


def test_a_program_that_fails_does_not_stop_the_next_case():
    code = "import sys\nx = input()\nif x == 'hang':\n  while True: pass\nif x == 'die': sys.exit(3)\nprint(x)"
    cases = [{"kind": "stdin", "stdin": text} for text in ("hang", "die", "fine")]
    hung, dead, fine = outcomes(code, *cases, limits=QUICK._replace(seconds=0.5))
    assert (hung.cause, dead.exit_code, fine.stdout) == ("time", 3, "fine\n")
