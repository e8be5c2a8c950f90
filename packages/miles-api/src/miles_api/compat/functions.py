"""Small helpers that hooks import from Miles and slime and that need no engine."""

from __future__ import annotations

import asyncio
import atexit
import base64
import functools
import io
import statistics
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from miles_api.loading.load import import_reference

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = [
    "SingletonMeta",
    "compute_rollout_step",
    "compute_statistics",
    "dict_add_prefix",
    "eager_create_task",
    "enable_experimental_rollout_refactor",
    "encode_image_for_rollout_engine",
    "get_async_loop",
    "get_model_url",
    "load_function",
    "run",
]

Result = TypeVar("Result")

_CLOSING = 5.0
"""Seconds to wait for that at the end of the process."""


def load_function(path: str | None) -> Any:
    """Import what `path` names, in any form that a flag takes; None gives None. Raises `HookLoadError`."""
    return None if path is None else import_reference(path, short_names="miles.hooks", flag="load_function")


class SingletonMeta(type):
    """Make every call of a class give the instance that the first one built."""

    _instances: dict[type, Any] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in cls._instances:
            cls._instances[cls] = super().__call__(*args, **kwargs)
        return cls._instances[cls]

    @staticmethod
    def clear_all_instances() -> None:
        """Forget every instance."""
        SingletonMeta._instances.clear()


class AsyncLoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="compat-loop", daemon=True).start()
        atexit.register(self.close)

    def run(self, coro: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine there and wait for it."""
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result()

    def close(self) -> None:
        """Shut down what is kept open until the loop ends, and stop the loop."""
        asyncio.run_coroutine_threadsafe(self.loop.shutdown_asyncgens(), self.loop).result(_CLOSING)
        self.loop.call_soon_threadsafe(self.loop.stop)


@functools.cache
def get_async_loop() -> AsyncLoopThread:
    """Return the one background loop of this process."""
    return AsyncLoopThread()


def run(coro: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in the background loop and wait for it; not to be called from that loop."""
    return get_async_loop().run(coro)


async def eager_create_task(coro: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """Create a task and let it start."""
    task = asyncio.create_task(coro)
    await asyncio.sleep(0)
    return task


def enable_experimental_rollout_refactor() -> bool:
    """Say that the newer rollout types are in use: always."""
    return True


def encode_image_for_rollout_engine(image: Any) -> str:
    """Return a PIL image as a PNG data URL."""
    buffer = io.BytesIO()
    (image if image.mode == "RGB" else image.convert("RGB")).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:  # noqa: ARG001  one model here
    """Return the router's URL of `endpoint`; Miles serves one model, whatever its name."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


def compute_rollout_step(args: Any, rollout_id: int) -> int:  # noqa: ARG001
    """Return the step under which a rollout is logged: its number."""
    return rollout_id


def compute_statistics(values: list[float]) -> dict[str, float]:
    """Return mean, median, max and min of `values`."""
    numbers = [float(value) for value in values]
    return {
        "mean": statistics.fmean(numbers),
        "median": statistics.median(numbers),
        "max": max(numbers),
        "min": min(numbers),
    }


def dict_add_prefix(d: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return `d` with `prefix` before every key."""
    return {f"{prefix}{key}": value for key, value in d.items()}
