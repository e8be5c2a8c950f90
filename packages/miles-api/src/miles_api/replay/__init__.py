"""Hooks called again on what a run recorded, to see what changes: `miles hooks run`.

A dump is read one record at a time. A `Replayer` takes what its hook is called with out of a record (`Subject`), one of
the callers (`in_process`, `workers`) makes the calls with a deadline each, and the replayer compares the results with
what was recorded.
"""

from miles_api.replay.result import Replay, Request
from miles_api.replay.run import replay

__all__ = ["Replay", "Request", "replay"]
