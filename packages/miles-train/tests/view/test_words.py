from __future__ import annotations

import pytest

from miles_train.view.series import moving_average
from miles_train.view.words import clock, duration, number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.3141, "0.314"), (5.1, "5.1"), (1240.4, "1,240"), (2.04e-6, "2e-6"), (2.5e-6, "2.5e-6"), (0, "0"),
     (-0.02, "-0.02"), (None, "—")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.142, "0.142 s"), (41.24, "41.2 s"), (750, "12 min 30 s"), (3600, "1 h"), (18_725, "5 h 12 min"),
     (273_600, "3 d 4 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_clock_shows_hours_only_when_there_are_some():
    assert [clock(32), clock(3723), clock(-1)] == ["0:32", "1:02:03", "0:00"]


def test_a_moving_average_looks_both_ways_and_skips_gaps():
    assert moving_average([0.0, 3.0, None, 9.0], 1) == [1.5, 1.5, 6.0, 9.0]
    assert moving_average([None, None], 1) == [None, None]
