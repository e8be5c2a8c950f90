"""What a program in the sandbox can see, reach, use up and leave behind.

Programs here attack within bounds that do no harm where the sandbox fails: so many forks, bytes and seconds.
"""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles_api.errors import ConfigError, ServiceError
from miles_hooks_contrib.sandbox import session, supervisor
from miles_hooks_contrib.sandbox.limits import Limits
from miles_hooks_contrib.sandbox.session import Session, require_sandbox

QUICK = Limits(seconds=5.0, memory_mib=256, processes=8, output_kib=64, files_mib=4)
AS_A_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"]
WITHOUT_NAMESPACES = [
    "unshare", "--user", "--map-root-user", "sh", "-c",
    'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh",
]  # fmt: skip


def allowed():
    try:
        require_sandbox()
    except ConfigError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(allowed()), reason=allowed())
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are made of Linux namespaces")


@pytest.fixture(params=["as it is", "as an ordinary user"])
def anybody(request, monkeypatch):
    """Start the supervisor as this user, and as one without rights of his own."""
    if request.param == "as an ordinary user":
        monkeypatch.setattr(session, "_COMMAND", [*AS_A_USER, *session._COMMAND])


def outcomes(code, *cases, limits=QUICK, sandboxed=True, packages=None):
    async def run():
        async with Session(code, limits, sandboxed=sandboxed, packages=packages) as open_session:
            return [await open_session.run(case) for case in cases or [{"kind": "stdin"}]]

    return asyncio.run(run())


def printed(code, **options):
    [outcome] = outcomes(code, **options)
    assert outcome.completed, outcome
    return outcome.stdout.strip()


ATTEMPTS = """
import ctypes, os, socket
for statement in {statements!r}:
    try:
        exec(statement)
        print("nothing")
    except Exception as error:
        print(type(error).__name__)
"""


def attempt(*statements, **options):
    """Return what kind of error each statement raises in the sandbox, `nothing` where none."""
    found = printed(ATTEMPTS.format(statements=statements), **options).split()
    return found if len(statements) > 1 else found[0]


@pytest.fixture
def marked():
    """A line of code that marks its process and children, and a function that counts those alive on the machine."""
    name = "m" + secrets.token_hex(6)
    line = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"

    def alive():
        count = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                count += (process / "comm").read_text().strip() == name
            except (FileNotFoundError, ProcessLookupError):
                continue
        return count

    return line, alive


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come true within 20 s"
        time.sleep(0.02)


@needs_sandbox
@pytest.mark.usefixtures("anybody")
class TestWhatItSees:
    def test_a_program_reads_its_input_and_prints(self):
        [first, second] = outcomes(
            "print(sum(map(int, input().split())))", *({"kind": "stdin", "stdin": text} for text in ("3 4\n", "5 6\n"))
        )
        assert (first.stdout, second.stdout) == ("7\n", "11\n")

    def test_it_is_nobody_and_cannot_become_anybody_else(self):
        assert printed("import os; print(os.getuid(), os.geteuid(), os.getgid())") == "65534 65534 65534"
        bounding = "assert ctypes.CDLL(None).prctl(23, 21, 0, 0, 0) == 0"  # whether CAP_SYS_ADMIN can ever be had
        became, could = attempt("os.setuid(0)", bounding)
        assert became in ("PermissionError", "OSError")
        assert could == "nothing"

    def test_there_are_no_files_of_the_machine(self, tmp_path):
        secret = tmp_path / "secret"
        secret.write_text("mine")
        paths = ("/etc/shadow", "/etc/passwd", str(Path.home() / ".bashrc"), str(secret), __file__)
        assert set(attempt(*(f"open({path!r}).read()" for path in paths))) == {"FileNotFoundError"}

    def test_there_are_no_other_processes_and_no_environment_of_theirs(self, monkeypatch):
        monkeypatch.setenv("A_SECRET_TOKEN", "hunter2")
        assert printed("import os; print('A_SECRET_TOKEN' in os.environ, os.getppid())") == "False 1"
        tried = attempt("open('/proc/1/environ').read()", f"os.kill({os.getpid()}, 0)", "os.kill(1, 9)")
        assert tried[:2] == ["FileNotFoundError", "ProcessLookupError"]

    def test_no_descriptor_is_inherited(self, tmp_path):
        with (tmp_path / "open").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            assert set(attempt(*(f"os.fstat({number})" for number in range(3, 60)))) == {"OSError"}

    def test_the_network_is_not_there(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            to_hypervisor = "socket.socket(40, socket.SOCK_STREAM)"
            tried = attempt(
                f"socket.create_connection(('127.0.0.1', {port}), 2)", to_hypervisor, "socket.socket(16, 3)"
            )
            assert tried == ["PermissionError"] * 3
            assert attempt("socket.socketpair(30)", "socket.socketpair()") == ["PermissionError", "nothing"]

    def test_sockets_of_the_machine_that_have_no_address_in_the_network_are_out_of_reach(self):
        name = "\0" + secrets.token_hex(8)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
            server.listen()
            assert attempt(f"socket.socket(socket.AF_UNIX).connect({name!r})") == "ConnectionRefusedError"

    def test_it_makes_no_namespaces_of_its_own(self):
        # The second is clone(CLONE_NEWUSER), which the filter lets pass: the namespace's own limit refuses it.
        calls = {"unshare": "c.unshare(0x10000000)", "x86_64": "c.syscall(56, 0x10000011, 0, 0, 0, 0)"}
        for name in ("unshare", os.uname().machine):
            code = f"import ctypes; c = ctypes.CDLL(None); print({calls.get(name, '-1')})"
            assert printed(code) == "-1"

    def test_it_cannot_disturb_the_process_that_watches_it(self):
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

    def test_a_signal_to_its_process_group_reaches_nobody_but_itself(self):
        outcome, again = outcomes("import os; os.killpg(0, 9)", {"kind": "stdin"}, {"kind": "stdin"})
        assert (outcome.exit_code, again.exit_code) == (-9, -9)

    def test_nothing_outside_its_directory_can_be_written(self):
        paths = ("/file", "/usr/file", f"{sys.base_prefix}/file", "/dev/file", "/proc/file")
        assert "nothing" not in attempt(*(f"open({path!r}, 'w')" for path in paths))

    def test_every_case_has_an_empty_directory_that_is_thrown_away(self):
        case = {"kind": "stdin"}
        code = "import os; print(os.getcwd(), os.listdir()); open('left', 'w').write('x'); open('/dev/shm/left', 'w')"
        assert [outcome.stdout for outcome in outcomes(code, case, case)] == ["/tmp []\n"] * 2


@needs_sandbox
class TestWhatItUses:
    def test_more_processes_than_allowed_end_all_of_them(self, marked):
        line, alive = marked
        code = (
            line + f"import os, time\nfor _ in range({2 * QUICK.processes}):\n  if os.fork() == 0: break\ntime.sleep(4)"
        )
        # The kernel refuses the fork, or process 1 sees them.
        [outcome] = outcomes(code)
        assert outcome.cause == "processes" or outcome.exit_code == 1
        assert alive() == 0

    def test_memory_of_one_process_is_bounded(self):
        assert attempt("bytearray(300 << 20)", "bytearray(100 << 20)") == ["MemoryError", "nothing"]

    def test_memory_of_all_processes_together_is_bounded(self, marked):
        line, alive = marked
        code = (
            line
            + "import os, time\nfor _ in range(5):\n  if os.fork() == 0: break\nx = b'x' * (90 << 20)\ntime.sleep(4)"
        )
        [outcome] = outcomes(code)
        assert outcome.cause == "memory"
        assert alive() == 0

    def test_memory_that_no_process_is_seen_to_use_cannot_be_had(self):
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

    def test_endless_output_is_cut_and_stopped(self):
        [outcome] = outcomes("for _ in range(100_000): print('x' * 1000)")
        assert outcome.cause == "output"
        assert len(outcome.stdout) == QUICK.output_kib * 1024

    def test_files_are_bounded_one_by_one_and_together(self):
        many = "for i in range(8):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))"
        assert attempt(many) == "OSError"
        assert attempt("open('one', 'wb').write(bytes(5 << 20))") == "OSError"
        both = "for path in ('/tmp/x', '/dev/shm/y'):\n    with open(path, 'wb') as f: f.write(bytes(5 << 19))"
        assert attempt(both) == "OSError"

    @pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(20)"])
    def test_time_is_bounded(self, code):
        [outcome] = outcomes(code, limits=QUICK._replace(seconds=0.5))
        assert outcome.cause == "time"

    def test_a_program_that_fails_does_not_stop_the_next_case(self):
        code = "import sys\nx = input()\nif x == 'hang':\n  while True: pass\nif x == 'die': sys.exit(3)\nprint(x)"
        cases = [{"kind": "stdin", "stdin": text} for text in ("hang", "die", "fine")]
        hung, dead, fine = outcomes(code, *cases, limits=QUICK._replace(seconds=0.5))
        assert (hung.cause, dead.exit_code, fine.stdout) == ("time", 3, "fine\n")


@needs_sandbox
class TestWhatIsLeft:
    def test_a_fork_bomb_stops_at_the_limit_and_leaves_nobody(self, marked):
        line, alive = marked
        code = line + (
            "import os, time\nborn = 0\n"
            "for _ in range(100):\n"
            "  try:\n    pid = os.fork()\n"
            "  except OSError: break\n"
            "  if pid == 0:\n    time.sleep(20); os._exit(0)\n"
            "  born += 1\nprint(born)"
        )
        assert int(printed(code)) == QUICK.processes - 1
        assert alive() == 0

    DAEMON = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "  os.setsid()\n"
        "  if os.fork() == 0:\n    time.sleep(60)\n"
        "  os._exit(0)\n"
        "os.wait(); print('done')"
    )

    @pytest.mark.parametrize("sandboxed", [True, False])
    def test_a_child_that_stays_behind_is_ended_and_not_waited_for(self, marked, sandboxed):
        line, alive = marked
        [outcome] = outcomes(line + self.DAEMON, sandboxed=sandboxed, limits=QUICK._replace(processes=4096))
        assert (outcome.cause, outcome.stdout) == (None, "done\n")
        assert alive() == 0

    def test_a_cancelled_run_leaves_nobody_and_no_zombie(self, marked):
        line, alive = marked

        async def cancelled():
            async with asyncio.timeout(20), Session(line + "import time; time.sleep(60)", Limits(seconds=60)) as opened:
                running = asyncio.ensure_future(opened.run({"kind": "stdin"}))
                while not alive():
                    await asyncio.sleep(0.01)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        before = children()
        asyncio.run(cancelled())
        assert alive() == 0
        assert children() == before

    def test_it_does_not_outlive_whoever_started_it(self, marked):
        line, alive = marked
        code = (
            "import asyncio\nfrom miles_hooks_contrib.sandbox.session import Limits, Session\n"
            "async def main():\n"
            f"    async with Session({line + 'import time; time.sleep(60)'!r}, Limits(seconds=60)) as session:\n"
            "        await session.run({'kind': 'stdin'})\n"
            "asyncio.run(main())"
        )
        starter = subprocess.Popen([sys.executable, "-c", code])
        try:
            wait_until(lambda: alive() == 1)
        finally:
            starter.send_signal(signal.SIGKILL)
            starter.wait()
        wait_until(lambda: alive() == 0)

    def test_a_supervisor_that_dies_is_an_error_and_no_outcome(self, marked):
        line, alive = marked

        async def killed():
            async with asyncio.timeout(20), Session(line + "import time; time.sleep(60)", Limits(seconds=60)) as opened:
                running = asyncio.ensure_future(opened.run({"kind": "stdin"}))
                while not alive():
                    await asyncio.sleep(0.01)
                os.killpg(opened._process.pid, signal.SIGKILL)
                await running

        with pytest.raises(ServiceError, match="died before it could answer"):
            asyncio.run(killed())
        wait_until(lambda: alive() == 0)


@pytest.mark.timeout(30)
def test_an_output_that_somebody_still_holds_open_is_not_waited_for():
    # As one that a program sent into a socket that it never read: it dies with the socket, some time after the program.
    ends = [os.pipe(), os.pipe()]
    watch = supervisor._Watch(os.getpid(), ends[0][0], ends[1][0], QUICK)
    os.write(ends[0][1], b"printed")
    watch.drain()
    assert watch.outcome(None, 0)["stdout"] == "printed"
    for descriptor in (watch._ended, *ends[0], *ends[1]):
        os.close(descriptor)


class TestWithoutNamespaces:
    @pytest.fixture(autouse=True)
    def _refused(self, monkeypatch):
        if allowed():
            pytest.skip("nothing is needed for a machine to refuse here")
        monkeypatch.setattr(session, "_COMMAND", [*WITHOUT_NAMESPACES, *session._COMMAND])

    def test_it_is_refused_with_the_step_that_failed_and_the_way_out(self):
        with pytest.raises(ConfigError, match=r"unshare: .*--allow-unsandboxed"):
            require_sandbox()

    def test_a_session_is_refused_too(self):
        with pytest.raises(ServiceError, match=r"could not make a sandbox: .*unshare: "):
            outcomes("print(1)")

    def test_limits_hold_for_those_who_accept_it(self):
        assert printed("print(1)", sandboxed=False) == "1"
        assert attempt("bytearray(300 << 20)", sandboxed=False) == "MemoryError"
        [outcome] = outcomes("while True: pass", sandboxed=False, limits=QUICK._replace(seconds=0.5))
        assert outcome.cause == "time"


def children():
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@needs_sandbox
def test_libraries_are_those_that_were_named(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "a_library.py").write_text("ANSWER = 42")
    assert printed("import a_library; print(a_library.ANSWER)", packages=str(tmp_path)) == "42"
    assert attempt("import msgspec") == "ModuleNotFoundError"
