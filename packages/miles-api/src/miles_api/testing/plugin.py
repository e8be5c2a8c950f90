"""The pytest plugin: fixtures for tests of hooks. Importing it costs every pytest session; so it imports nothing."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["check_hook", "hook_args", "make_group", "make_prompt", "make_sample"]


@pytest.fixture
def check_hook() -> Any:
    """Return `miles_api.testing.check_hook`; a hook whose package is not installed skips the test."""
    from miles_api.testing.check import check_hook as check
    from miles_api.testing.result import ConformanceSkip

    def checked(name: str, fn: Any, /, **options: Any) -> Any:
        __tracebackhide__ = True
        try:
            return check(name, fn, **options)
        except ConformanceSkip as skipped:
            return pytest.skip(str(skipped))

    return checked


@pytest.fixture
def make_sample() -> Any:
    """Return `miles_api.testing.make_sample`: a finished, unscored sample, any field as given."""
    from miles_api.testing.samples import make_sample as make

    return make


@pytest.fixture
def make_prompt() -> Any:
    """Return `miles_api.testing.make_prompt`: a pending sample, any field as given."""
    from miles_api.testing.samples import make_prompt as make

    return make


@pytest.fixture
def make_group() -> Any:
    """Return `miles_api.testing.make_group`: the finished samples of one prompt."""
    from miles_api.testing.samples import make_group as make

    return make


@pytest.fixture
def hook_args() -> Any:
    """Return `miles_api.testing.hook_args`: the `args` that a hook gets, any option as given."""
    from miles_api.testing.options import hook_args as make

    return make
