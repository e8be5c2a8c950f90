"""The process that watches a program, without a sandbox around it."""

import os
import sys

import pytest

from miles_hooks_contrib.sandbox import supervisor

from .conftest import QUICK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched through Linux descriptors")


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
