"""The version of the hook ABI, and the one that each release of miles-api ships."""

from __future__ import annotations

__all__ = ["ABI", "ABI_OF_RELEASE", "Version", "shown"]

Version = tuple[int, int]

ABI: Version = (1, 0)
"""Major and minor of the hook ABI; apart from the version of the distribution."""

ABI_OF_RELEASE: dict[Version, Version] = {(0, 1): (1, 0), (1, 0): (1, 0)}
"""From a release series of miles-api (major, minor) to the ABI it ships: how a distribution's requirement on miles-api
says which ABI its hooks were written for. A release that ships another ABI adds a line; the series between two lines
ship the ABI of the lower one. Releases may come more often than ABIs, but majors move together: release 1.0 freezes ABI
1.0, and 2.0 is the first release with ABI 2.0."""


def shown(version: Version) -> str:
    """Return `1.0` for `(1, 0)`."""
    return f"{version[0]}.{version[1]}"
