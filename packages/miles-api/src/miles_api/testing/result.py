"""What a conformance check ends with: a report, an error or a skip."""

from __future__ import annotations

import msgspec

from miles_api.errors import HookError, MilesError

__all__ = ["ConformanceError", "ConformanceSkip", "Report"]


class ConformanceError(HookError, AssertionError):
    """A hook fits its stub but does not behave as the stub says. The hook's own exception is its `__cause__`."""

    def __init__(
        self,
        problem: str,
        *,
        hook: str = "",
        reference: str = "",
        check: str = "",
        sample: int | None = None,
        field: str | None = None,
    ) -> None:
        where = "".join(
            f"{what} {value}: " for what, value in (("sample", sample), ("field", field)) if value is not None
        )
        super().__init__(f"{hook} hook {reference}: {check}: {where}{problem}")
        self.hook = hook
        self.reference = reference
        self.check = check
        """What was checked, in words."""
        self.sample = sample
        """The index of the sample it is about, where it is about one."""
        self.field = field
        """The sample's field, column or key it is about."""


class ConformanceSkip(MilesError):  # noqa: N818  not an error: nothing was found wrong
    """A hook cannot be called here, since a package is not installed. The pytest fixture turns it into a skip."""


class Report(msgspec.Struct, frozen=True):
    """What was checked of a hook, all of it well."""

    hook: str
    reference: str
    passed: list[str]
    """The checks, in words."""
    left_out: str = ""
    """What this kit cannot see and only a run shows."""
    notes: list[str] = []
    """What is right, and still asks something of the run."""
