"""Time what our wrapping adds to a hook that does nothing, and what `import miles_api` adds to `import msgspec`.

`python benchmarks/hooks.py` prints microseconds a call, wrapped beside bare, best of several interleaved runs, and
milliseconds of whole fresh interpreters, medians of 15 interleaved runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from miles_api import Args, Sample
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import bind
from miles_api.loading.plain import make_plain

if TYPE_CHECKING:
    from collections.abc import Callable

_IMPORTS = {"nothing": "pass", "msgspec": "import msgspec", "miles_api": "import miles_api"}


def reward(args: Any, sample: Any) -> float:  # noqa: ARG001
    """Do nothing."""
    return 0.0


async def async_reward(args: Any, sample: Any) -> float:  # noqa: ARG001
    """Do nothing, without giving way to the loop."""
    return 0.0


def convert(_args: Any, _samples: Any, *, raw_rewards: Any, rewards: Any) -> list[Any]:
    """Do nothing, with keywords."""
    return [raw_rewards, rewards]


def timed(call: Callable[[], Any], count: int) -> float:
    """Return microseconds a call."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return 1e6 * (time.perf_counter() - start) / count


async def atimed(call: Callable[[], Any], count: int) -> float:
    """Return microseconds an awaited call."""
    start = time.perf_counter()
    for _ in range(count):
        await call()
    return 1e6 * (time.perf_counter() - start) / count


def best(wrapped: Callable[[], float], bare: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Return the best of each, runs interleaved."""
    pairs = [(wrapped(), bare()) for _ in range(repeats)]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def show(name: str, wrapped: float, bare: float) -> None:
    """Print one row."""
    print(f"{name:44} {wrapped:8.2f} {bare:8.2f} {wrapped - bare:+8.2f}")


def calls(count: int, repeats: int) -> None:
    """Time sync and async hooks, and one in a thread."""
    args, sample = Args({"seed": 1}), Sample()
    plain = bind(REGISTRY["reward"], "bench", reward, args.fork())
    show("def, 2 arguments", *best(
        lambda: timed(lambda: plain(args, sample), count), lambda: timed(lambda: reward(args, sample), count), repeats
    ))  # fmt: skip
    keywords = {"raw_rewards": [], "rewards": []}
    named = bind(REGISTRY["convert_samples"], "bench", convert, args.fork())
    show("def, 2 arguments and 2 keywords", *best(
        lambda: timed(lambda: named(args, [], **keywords), count),
        lambda: timed(lambda: convert(args, [], **keywords), count), repeats,
    ))  # fmt: skip
    awaited = bind(REGISTRY["reward"], "bench", async_reward, args.fork())
    show("async def", *best(
        lambda: asyncio.run(atimed(lambda: awaited.acall(None, args, sample), count)),
        lambda: asyncio.run(atimed(lambda: async_reward(args, sample), count)), repeats,
    ))  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        few = max(count // 20, 1)

        async def in_thread() -> float:
            loop = asyncio.get_running_loop()
            return await atimed(lambda: loop.run_in_executor(pool, reward, args, sample), few)

        show("def, awaited in a thread", *best(
            lambda: asyncio.run(atimed(lambda: plain.acall(pool, args, sample), few)),
            lambda: asyncio.run(in_thread()), repeats,
        ))  # fmt: skip


def samples(count: int, repeats: int) -> None:
    """Time the check of a sample that is plain already, by its length."""
    for length in (8, 8192):
        sample = Sample(
            tokens=[1] * length, response_length=length, loss_mask=[1] * length, rollout_log_probs=[-0.5] * length,
            reward=1.0, metadata={"a": 1, "b": "two"},
        )  # fmt: skip
        took = min(timed(lambda sample=sample: make_plain(sample, "bench"), count) for _ in range(repeats))
        print(f"{f'make_plain, {length} tokens':44} {took:8.2f}")


def imports(repeats: int) -> None:
    """Time fresh interpreters."""
    took: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for _ in range(repeats):
        for name, code in _IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            took[name].append(1e3 * (time.perf_counter() - start))
    nothing, base, ours = (statistics.median(took[name]) for name in _IMPORTS)
    print(f"\nms of a fresh interpreter: nothing {nothing:.0f}, import msgspec {base:.0f}, import miles_api {ours:.0f}")
    print(f"import miles_api alone: {ours - nothing:.0f} ms, {(ours - nothing) / (base - nothing):.2f} × msgspec")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="calls a run")
    parser.add_argument("--repeats", type=int, default=7, help="runs, of which the best counts")
    parser.add_argument("--imports", type=int, default=15, help="fresh interpreters of each kind")
    options = parser.parse_args()
    print(f"{'µs a call':44} {'wrapped':>8} {'bare':>8} {'added':>8}")
    calls(options.count, options.repeats)
    samples(options.count, options.repeats)
    imports(options.imports)


if __name__ == "__main__":
    main()
