"""A machine that refuses namespaces: so is the run, unless it accepts programs without them."""

import pytest

from miles_api.errors import ConfigError, ServiceError
from miles_hooks_contrib.sandbox import session
from miles_hooks_contrib.sandbox.session import require_sandbox

from .conftest import QUICK, attempt, needs_sandbox, outcomes, printed

pytestmark = needs_sandbox  # a machine that refuses on its own has nothing to show here
WITHOUT_NAMESPACES = [
    "unshare", "--user", "--map-root-user", "sh", "-c",
    'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _refused(monkeypatch):
    monkeypatch.setattr(session, "_COMMAND", [*WITHOUT_NAMESPACES, *session._COMMAND])


def test_it_is_refused_with_the_step_that_failed_and_the_way_out():
    with pytest.raises(ConfigError, match=r"unshare: .*--allow-unsandboxed"):
        require_sandbox()


def test_a_session_is_refused_too():
    with pytest.raises(ServiceError, match=r"could not make a sandbox: .*unshare: "):
        outcomes("print(1)")


def test_limits_hold_for_those_who_accept_it():
    assert printed("print(1)", sandboxed=False) == "1"
    assert attempt("bytearray(300 << 20)", sandboxed=False) == "MemoryError"
    [outcome] = outcomes("while True: pass", sandboxed=False, limits=QUICK._replace(seconds=0.5))
    assert outcome.cause == "time"
