"""Watches an engine that runs: one that lives and does not react is as good as dead.

It is asked for `/server_info`, which SGLang's scheduler answers itself, between two steps. `/health` would not do:
SGLang generates a token for it, which a paused engine does not, and one that has given up its memory cannot.
"""

from __future__ import annotations

import threading
import time
import urllib.error
from typing import TYPE_CHECKING

from miles_rollout.engines.asking import request

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HealthWatch"]

_LONGEST_WAIT = 10.0
_ASKS = 5
"""How often an engine is asked in the time after which it counts as dead, at least."""


class HealthWatch:
    """Asks one engine again and again, from a thread of its own, until `stop`."""

    def __init__(
        self, url: str, timeout: float, on_change: Callable[[str], None] = lambda _: None, *, key: str = ""
    ) -> None:
        """Watch the engine at `url`; silent for `timeout` seconds it counts as dead, 0 never asks.

        `on_change` is told why it counts as dead, once; `key` is the engine's.
        """
        self._url, self._timeout, self._on_change, self._key = url, timeout, on_change, key
        self._stopped = threading.Event()
        self.problem = ""
        """Why it counts as dead; empty while it reacts."""
        if timeout > 0:
            threading.Thread(target=self._watch, name=f"health {url}", daemon=True).start()

    def stop(self) -> None:
        """Ask no further; what was found stays."""
        self._stopped.set()

    def _watch(self) -> None:
        silent_since: float | None = None
        while not self._stopped.wait(min(self._timeout / _ASKS, _LONGEST_WAIT)):
            asked = time.monotonic()
            silent_since = asked if silent_since is None else silent_since
            # The time counts only while a question is open: a driver that sleeps proves nothing of the engine.
            why = self._asked(max(self._timeout - (asked - silent_since), self._timeout / _ASKS))
            if not why:
                silent_since, self.problem = None, ""
            elif time.monotonic() - silent_since >= self._timeout and not self.problem and not self._stopped.is_set():
                self.problem = (
                    f"does not answer /server_info for {self._timeout:g} s (--engine-health-timeout), the last time: "
                    f"{why}"
                )
                self._on_change(self.problem)

    def _asked(self, timeout: float) -> str:
        """Return why the engine did not answer; an answer that says no is one, too."""
        try:
            request(self._url + "/server_info", None, timeout, self._key)
        except urllib.error.HTTPError:
            return ""
        except OSError as error:
            return str(error) or type(error).__name__
        return ""
