"""What a program in the sandbox can see and reach."""

import os
import secrets
import signal
import socket
import sys
from pathlib import Path

import pytest

from .conftest import ATTEMPTS, attempt, needs_sandbox, outcomes, printed

pytestmark = [needs_sandbox, pytest.mark.usefixtures("anybody")]


def test_a_program_reads_its_input_and_prints():
    [first, second] = outcomes(
        "print(sum(map(int, input().split())))", *({"kind": "stdin", "stdin": text} for text in ("3 4\n", "5 6\n"))
    )
    assert (first.stdout, second.stdout) == ("7\n", "11\n")


def test_it_is_nobody_and_cannot_become_anybody_else():
    assert printed("import os; print(os.getuid(), os.geteuid(), os.getgid())") == "65534 65534 65534"
    bounding = "assert ctypes.CDLL(None).prctl(23, 21, 0, 0, 0) == 0"  # whether CAP_SYS_ADMIN can ever be had
    became, could = attempt("os.setuid(0)", bounding)
    assert became in ("PermissionError", "OSError")
    assert could == "nothing"


def test_there_are_no_files_of_the_machine(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    paths = ("/etc/shadow", "/etc/passwd", str(Path.home() / ".bashrc"), str(secret), __file__)
    assert set(attempt(*(f"open({path!r}).read()" for path in paths))) == {"FileNotFoundError"}


def test_there_are_no_other_processes_and_no_environment_of_theirs(monkeypatch):
    monkeypatch.setenv("A_SECRET_TOKEN", "hunter2")
    assert printed("import os; print('A_SECRET_TOKEN' in os.environ, os.getppid())") == "False 1"
    tried = attempt("open('/proc/1/environ').read()", f"os.kill({os.getpid()}, 0)", "os.kill(1, 9)")
    assert tried[:2] == ["FileNotFoundError", "ProcessLookupError"]


def test_no_descriptor_is_inherited(tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert set(attempt(*(f"os.fstat({number})" for number in range(3, 60)))) == {"OSError"}


def test_the_network_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        to_hypervisor = "socket.socket(40, socket.SOCK_STREAM)"
        tried = attempt(f"socket.create_connection(('127.0.0.1', {port}), 2)", to_hypervisor, "socket.socket(16, 3)")
        assert tried == ["PermissionError"] * 3
        assert attempt("socket.socketpair(30)", "socket.socketpair()") == ["PermissionError", "nothing"]


def test_sockets_of_the_machine_that_have_no_address_in_the_network_are_out_of_reach():
    name = "\0" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        assert attempt(f"socket.socket(socket.AF_UNIX).connect({name!r})") == "ConnectionRefusedError"


def test_it_makes_no_namespaces_of_its_own():
    # The second is clone(CLONE_NEWUSER), which the filter lets pass: the namespace's own limit refuses it.
    calls = {"unshare": "c.unshare(0x10000000)", "x86_64": "c.syscall(56, 0x10000011, 0, 0, 0, 0)"}
    for name in ("unshare", os.uname().machine):
        code = f"import ctypes; c = ctypes.CDLL(None); print({calls.get(name, '-1')})"
        assert printed(code) == "-1"


def test_it_cannot_disturb_the_process_that_watches_it():
    tries = (
        *(f"os.kill(1, {number})" for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)),
        "os.setpriority(os.PRIO_PROCESS, 1, 19)",
        "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
        "os.sched_setaffinity(1, {0})",
        "open('/proc/1/mem')",
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    )
    case = {"kind": "stdin"}
    first, second = outcomes(ATTEMPTS.format(statements=tries), case, case)
    assert first.stdout == second.stdout
    found = first.stdout.split()
    assert set(found[:4]) <= {"nothing", "PermissionError"}
    assert found[4:] == ["PermissionError"] * 3 + ["FileNotFoundError", "nothing"]


def test_a_signal_to_its_process_group_reaches_nobody_but_itself():
    outcome, again = outcomes("import os; os.killpg(0, 9)", {"kind": "stdin"}, {"kind": "stdin"})
    assert (outcome.exit_code, again.exit_code) == (-9, -9)


def test_nothing_outside_its_directory_can_be_written():
    paths = ("/file", "/usr/file", f"{sys.base_prefix}/file", "/dev/file", "/proc/file")
    assert "nothing" not in attempt(*(f"open({path!r}, 'w')" for path in paths))


def test_every_case_has_an_empty_directory_that_is_thrown_away():
    case = {"kind": "stdin"}
    code = "import os; print(os.getcwd(), os.listdir()); open('left', 'w').write('x'); open('/dev/shm/left', 'w')"
    assert [outcome.stdout for outcome in outcomes(code, case, case)] == ["/tmp []\n"] * 2


def test_libraries_are_those_that_were_named(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "a_library.py").write_text("ANSWER = 42")
    assert printed("import a_library; print(a_library.ANSWER)", packages=str(tmp_path)) == "42"
    assert attempt("import msgspec") == "ModuleNotFoundError"
