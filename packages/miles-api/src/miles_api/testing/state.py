"""What a running rollout offers to hooks, in memory: the `GenerateState` and a data source."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError
from miles_api.testing.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.rollout_types import Group
    from miles_api.sample import Sample
    from miles_api.testing.engine import Engine
    from miles_api.testing.samples import Maker

__all__ = ["MemorySource", "State"]

_CONCURRENCY = 16


class State:
    """A `GenerateState` whose `post` asks an `Engine` in this process."""

    def __init__(self, args: Args, engine: Engine) -> None:
        self.args = args
        self.tokenizer: Any = ByteTokenizer()
        self.processor = None
        self.aborted = False
        self.sampling_params: dict[str, Any] = {
            "temperature": args.rollout_temperature, "top_p": args.rollout_top_p, "top_k": args.rollout_top_k,
            "max_new_tokens": args.rollout_max_response_len,
            "skip_special_tokens": args.rollout_skip_special_tokens,
            "stop": list(args.rollout_stop or []), "stop_token_ids": list(args.rollout_stop_token_ids or []),
        }  # fmt: skip
        self._engine = engine

    @functools.cached_property
    def generate_fn_semaphore(self) -> asyncio.Semaphore:
        """Bounds how many generations run at once."""
        return asyncio.Semaphore(_CONCURRENCY)

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's answer; raise `ServiceError` where it would refuse."""
        # Others get their turn, as they do while a request is on its way.
        await asyncio.sleep(0)
        try:
            return self._engine.answer(path, payload)
        except (LookupError, ValueError, TypeError) as error:
            raise ServiceError(f"{path} was refused: {error}") from error


class MemorySource:
    """A data source that never ends: returned groups first, then made ones."""

    def __init__(self, maker: Maker, group_size: int) -> None:
        self._maker = maker
        self._size = group_size
        self.returned: list[Group] = []
        """The groups that were put back and not handed out again."""

    def get_samples(self, num_samples: int) -> list[Any]:
        """Return groups of pending samples."""
        taken = self.returned[:num_samples]
        del self.returned[:num_samples]
        fresh: list[list[Sample]] = self._maker.prompts(num_samples - len(taken), self._size)
        return [*taken, *fresh]

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups back."""
        self.returned += samples

    def get_buffer_length(self) -> int:
        """Return how many groups were put back."""
        return len(self.returned)

    def save(self, rollout_id: int) -> None:
        """Do nothing: there is nothing to lose."""

    def load(self, rollout_id: int | None = None) -> None:
        """Do nothing."""
