"""`--hook-error-budget`: how many groups a run may lose to failing hooks."""

from __future__ import annotations

import math
import re

from miles_api.errors import ConfigError

__all__ = ["ErrorBudget"]

_FORM = re.compile(r"(?P<count>\d+)|(?P<share>\d+(\.\d+)?)%|(?P<both>\d+)\s*,\s*(?P<part>\d+(\.\d+)?)%")

_EVERYTHING = 100.0


class ErrorBudget:
    """Counts groups that were started and groups that were lost; both over the whole run."""

    def __init__(self, text: str, least: int = 1) -> None:
        """Read `N`, `P%` or `N,P%`; `ConfigError` for anything else.

        A share is taken of at least `least` groups, so that the first loss of a run is not yet half of everything.
        """
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"--hook-error-budget {text!r} is neither a number, a share (10%) nor both (16,10%)")
        count, share = found["count"] or found["both"], found["share"] or found["part"]
        if share is not None and float(share) >= _EVERYTHING:
            raise ConfigError(f"--hook-error-budget {text!r} would let every group fail: a share has to be below 100%")
        self.text = text
        self._count = math.inf if count is None else int(count)
        self._share = math.inf if share is None else float(share) / 100
        self._least = least
        self.started = 0
        self.lost = 0

    def state_dict(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {"started": self.started, "lost": self.lost}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counts of the run that is continued."""
        self.started, self.lost = state["started"], state["lost"]

    def allowed(self) -> float:
        """Return how many groups may be lost by now."""
        by_share = math.inf if self._share == math.inf else self._share * max(self.started, self._least)
        return min(self._count, by_share)

    def spend(self) -> bool:
        """Count a lost group; True when that was one too many."""
        self.lost += 1
        return self.lost > self.allowed()
