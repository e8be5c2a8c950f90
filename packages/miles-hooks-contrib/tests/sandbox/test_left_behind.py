"""What a program in the sandbox leaves behind: nobody, however it ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from miles_api.errors import ServiceError
from miles_hooks_contrib.sandbox.limits import Limits
from miles_hooks_contrib.sandbox.session import Session

from .conftest import QUICK, needs_sandbox, outcomes, printed, wait_until

pytestmark = needs_sandbox


def children():
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@contextlib.asynccontextmanager
async def under_way(marked):
    """Give a session, and the run of a program in it that has begun and sleeps."""
    line, alive = marked
    async with asyncio.timeout(20), Session(line + "import time; time.sleep(60)", Limits(seconds=60)) as opened:
        running = asyncio.ensure_future(opened.run({"kind": "stdin"}))
        while not alive():
            await asyncio.sleep(0.01)
        yield opened, running


def test_a_fork_bomb_stops_at_the_limit_and_leaves_nobody(marked):
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
def test_a_child_that_stays_behind_is_ended_and_not_waited_for(marked, sandboxed):
    line, alive = marked
    [outcome] = outcomes(line + DAEMON, sandboxed=sandboxed, limits=QUICK._replace(processes=4096))
    assert (outcome.cause, outcome.stdout) == (None, "done\n")
    assert alive() == 0


def test_a_cancelled_run_leaves_nobody_and_no_zombie(marked):
    _, alive = marked

    async def cancelled():
        async with under_way(marked) as (_, running):
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    before = children()
    asyncio.run(cancelled())
    assert alive() == 0
    assert children() == before


def test_it_does_not_outlive_whoever_started_it(marked):
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


def test_a_supervisor_that_dies_is_an_error_and_no_outcome(marked):
    _, alive = marked

    async def killed():
        async with under_way(marked) as (opened, running):
            os.killpg(opened._process.pid, signal.SIGKILL)
            await running

    with pytest.raises(ServiceError, match="died before it could answer"):
        asyncio.run(killed())
    wait_until(lambda: alive() == 0)
