"""`--save-debug-train-data`: what each rollout was trained on, in a file that `miles hooks run` replays hooks on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.record import DumpHeader, DumpWriter, RecordedTrainBatch
from miles_api.run_options import RunOptions
from miles_train.columns import to_plain

if TYPE_CHECKING:
    from miles_api.config import RunConfig

__all__ = ["TrainRecorder"]


class TrainRecorder:
    """Writes one record a rollout; the file is created with the first, and continued by a run that continues one."""

    def __init__(self, config: RunConfig) -> None:
        self._run = config.group(RunOptions)
        self._header = DumpHeader(kind="train", config=config.public(), tokenizer=self._run.hf_checkpoint or "")
        self._writer: DumpWriter | None = None
        self._after: int | None = None

    def continue_after(self, rollout_id: int) -> None:
        """Continue a record that is there already behind this rollout; later rollouts in it are cut."""
        self._after = rollout_id

    def write(self, rollout_id: int, rollout_data: dict[str, Any]) -> None:
        """Append the columns of a rollout as this rank trains on them, if they are to be recorded.

        Raises:
            DataError: the file cannot be written.
            WireError: a column that a hook added holds something that is no plain value.
        """
        path = self._run.save_debug_train_data
        if path is None:
            return
        if self._writer is None:
            self._writer = DumpWriter(path, self._header, append=self._after is not None, after=self._after)
        self._writer.write(RecordedTrainBatch(rollout_id, to_plain(rollout_data)))

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
