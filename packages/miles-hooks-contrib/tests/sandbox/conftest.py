"""Programs in a sandbox, and what became of them.

Programs here attack within bounds that do no harm where the sandbox fails: so many forks, bytes and seconds.
"""

import asyncio
import secrets
import sys
import time
from pathlib import Path

import pytest

from miles_api.errors import ConfigError
from miles_hooks_contrib.sandbox import session
from miles_hooks_contrib.sandbox.limits import Limits
from miles_hooks_contrib.sandbox.session import Session, require_sandbox

QUICK = Limits(seconds=5.0, memory_mib=256, processes=8, output_kib=64, files_mib=4)
AS_A_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"]


def refusal():
    """Return why these tests cannot run here, or nothing."""
    if sys.platform != "linux":
        return "sandboxes are made of Linux namespaces"
    try:
        require_sandbox()
    except ConfigError as error:
        return str(error)
    return ""


_REFUSAL = refusal()
needs_sandbox = pytest.mark.skipif(bool(_REFUSAL), reason=_REFUSAL)


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
