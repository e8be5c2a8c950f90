"""Every error Miles raises on purpose, so that a caller can tell a user's mistake from a defect of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = [
    "ConfigError",
    "DataError",
    "HookError",
    "HookLoadError",
    "HookResultError",
    "HookSignatureError",
    "HookVersionError",
    "MilesDeprecationWarning",
    "MilesError",
    "SampleError",
    "ServiceError",
    "WireError",
    "counted",
    "did_you_mean",
    "problem_of",
]


class MilesError(Exception):
    """The base of all our errors; the `miles` program prints its text without a traceback and exits 2."""


class ConfigError(MilesError):
    """A flag, a TOML key or a combination of them cannot work."""


class DataError(MilesError):
    """A prompt file, a model directory or a checkpoint is missing or malformed."""


class SampleError(MilesError):
    """A `Sample` or a batch column contradicts itself."""


class WireError(MilesError):
    """A value that cannot travel between processes or into a dump, or bytes that are no sample."""


class ServiceError(MilesError):
    """An engine, the router or a trainer did not start, died or answered with an error."""


class HookError(MilesError):
    """The base of what can be wrong with a hook."""


class HookLoadError(HookError):
    """A reference names nothing that can be imported."""

    def __init__(self, message: str, *, missing: str | None = None) -> None:
        super().__init__(message)
        self.missing = missing
        """The top-level module that its import needs and this process lacks, such as `megatron`; None when the
        reference itself names what is not there. A hook of a trainer rank may load there and not here."""


class HookSignatureError(HookError):
    """A hook cannot be called the way Miles calls it."""


class HookVersionError(HookError):
    """A hook was written for an ABI that this build does not speak."""


class HookResultError(HookError):
    """A hook returned something its signature does not allow."""


class MilesDeprecationWarning(FutureWarning):
    """A run configures something that a later major version will not have. Shown without `-W`, unlike most."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of `known`, or an empty string."""
    import difflib  # noqa: PLC0415  a tenth of `import miles_api`, and only errors need it

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f"; did you mean {near[0]!r}?" if near else ""


def counted(count: int | str, one: str, several: str = "") -> str:
    """Return a number with its noun: `1 group`, `2 groups`; `several` is the plural that an s does not make."""
    shown = count if isinstance(count, str) else f"{count:,}"
    return f"{shown} {one if shown == '1' else several or one + 's'}"


def problem_of(call: Callable[[], Any]) -> Iterator[str]:
    """Yield the text of the `MilesError` that `call` raises, or nothing: how checks collect all problems."""
    try:
        call()
    except MilesError as error:
        yield str(error)
