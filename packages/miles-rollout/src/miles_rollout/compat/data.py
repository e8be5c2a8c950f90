"""The data sources that hooks of the older stacks build on, by the attribute names they use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.compat.types import DataSource
from miles_rollout import data_source

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.rollout_types import Group

__all__ = ["RolloutDataSource", "RolloutDataSourceWithBuffer"]


class RolloutDataSourceWithBuffer(data_source.RolloutDataSourceWithBuffer, DataSource):
    """Our default source; what it knows can also be read, and its buffer changed, by the older names."""

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.args = args
        self.metadata: dict[str, Any] = {}

    @property
    def buffer(self) -> list[Group]:
        """The groups that came back, oldest first; it may be changed in place."""
        return self._buffer

    @property
    def epoch_id(self) -> int:
        """How often the prompts were handed out."""
        return self._epoch

    @property
    def sample_offset(self) -> int:
        """How many prompts of this epoch were handed out."""
        return self._position

    @property
    def sample_group_index(self) -> int:
        """The number of the next group."""
        return self._next_group

    @property
    def sample_index(self) -> int:
        """The number of the next sample."""
        return self._next_sample

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        """Keep some values for `get_metadata`; they are not saved."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        """Return the values given to `update_metadata`."""
        return self.metadata

    def __len__(self) -> int:
        """Return how many prompts an epoch has."""
        return len(self._prompts)


class RolloutDataSource(RolloutDataSourceWithBuffer):
    """The source without a buffer: groups do not come back."""

    def add_samples(self, samples: list[Group]) -> None:
        """Refuse groups."""
        DataSource.add_samples(self, samples)
