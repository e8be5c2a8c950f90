import os
import signal
import threading

import pytest

from miles_train.driver.interrupts import Interrupts


def send(signum):
    os.kill(os.getpid(), signum)


def test_a_signal_cuts_nothing_short_and_is_found_by_who_asks():
    with Interrupts() as interrupts:
        interrupts.check()
        send(signal.SIGTERM)
        done = True
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert done
    assert (interrupts.name, interrupts.exit_code) == ("SIGTERM", 143)


def test_a_thread_that_asks_learns_of_it_too():
    caught = []

    def ask():
        try:
            interrupts.check()
        except KeyboardInterrupt:
            caught.append(True)

    with Interrupts() as interrupts:
        send(signal.SIGINT)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert caught == [True]
    assert interrupts.exit_code == 130


def test_where_it_may_a_signal_cuts_short_a_wait():
    timer = threading.Timer(0.05, send, [signal.SIGINT])
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.raising():
        timer.start() or threading.Event().wait(60)
    assert interrupts.name == "SIGINT"


def test_only_the_first_signal_counts_however_impatient(capfd):
    cleaned = []
    with Interrupts() as interrupts:
        try:
            with interrupts.raising():
                send(signal.SIGTERM)
        except KeyboardInterrupt:
            for _ in range(3):
                send(signal.SIGINT)
                cleaned.append(True)
    assert len(cleaned) == 3
    assert interrupts.name == "SIGTERM"
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        "miles train: SIGTERM: stopping", *["miles train: SIGINT: still stopping"] * 3
    ]  # fmt: skip


def test_a_signal_counts_though_nobody_reads_what_is_said(monkeypatch):
    # `miles train 2>&1 | tee log`: Ctrl-C ends tee as well.
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr("sys.__stderr__", unread)
        with Interrupts() as interrupts:
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
    monkeypatch.setattr("sys.__stderr__", unread)
    with Interrupts() as interrupts:
        send(signal.SIGTERM)
    assert interrupts.exit_code == 143


def test_a_signal_that_came_before_the_block_is_raised_at_its_begin():
    with Interrupts() as interrupts:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            pytest.fail("the block must not begin")


def test_a_signal_that_is_ignored_stays_ignored_and_handlers_are_given_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    term = signal.getsignal(signal.SIGTERM)
    try:
        with Interrupts() as interrupts:
            send(signal.SIGINT)
            interrupts.check()
            assert signal.getsignal(signal.SIGTERM) != term
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == term
    finally:
        signal.signal(signal.SIGINT, before)
