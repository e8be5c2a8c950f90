"""Samples to bytes and back against pickle and json of an equal dataclass and against copying the bytes; reading dumps.

`hatch run python benchmarks/wire.py`. Microseconds are the best of several repetitions; look at the ratios.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import pickle
import random
import struct
import tempfile
import timeit
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api import Sample
from miles_api.record import DumpHeader, DumpWriter, RecordedGroup, RecordedRollout, read_dump
from miles_api.wire import decode_sample, encode_sample

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = ("tokens", "loss_mask", "rollout_log_probs")
PROMPT = 200
Plain = dataclasses.make_dataclass("Plain", [(name, Any) for name in Sample.__struct_fields__])
Plain.__module__ = __name__


def a_sample(length: int, index: int = 0) -> Sample:
    """Return a finished sample of `length` response tokens, as an engine and a reward leave it."""
    rng = random.Random(index)
    log_probs = struct.unpack(f"<{length}f", struct.pack(f"<{length}f", *(-rng.expovariate(2) for _ in range(length))))
    return Sample(
        group_index=index // 8, index=index, rollout_id=index, prompt="What is 6 times 7? " * 10, label="42",
        reward=1.0, tokens=[rng.randrange(150_000) for _ in range(PROMPT + length)], response_length=length,
        response="so " * length, loss_mask=[1] * length, rollout_log_probs=list(log_probs), weight_versions=["3"],
        status=Sample.Status.COMPLETED, metadata={"source": "arithmetic", "level": 3},
    )  # fmt: skip


def touch(sample: Any) -> Any:
    """Read every column."""
    for name in COLUMNS:
        getattr(sample, name)
    return sample


def as_plain(sample: Sample) -> Any:
    """Return an equal dataclass, its columns lists."""
    return Plain(**{name: getattr(sample, name) for name in Sample.__struct_fields__})


def to_json(plain: Any) -> bytes:
    """Encode with the standard library's json, as a data source or a log would."""
    return json.dumps(vars(plain) | {"spec_info": None, "prefix_cache_info": None}).encode()


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """Return the best mean of a few repetitions."""
    timer = timeit.Timer(call)
    number = max(1, int(seconds / 5 / max(timer.timeit(1), 1e-7)))
    return min(timer.repeat(5, number)) / number * 1e6


def rows_of(length: int, seconds: float) -> list[tuple[str, float, float, int]]:
    """Return (what, encode µs, decode µs, bytes) for each way."""
    sample = a_sample(length)
    plain = as_plain(sample)
    wire, pickled, text = encode_sample(sample), pickle.dumps(plain, 5), to_json(plain)
    ours = pickle.dumps(sample, 5)
    untouched = decode_sample(wire)
    raw = bytes(len(wire))
    ways: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
        ("copy of the bytes", lambda: bytearray(raw), lambda: bytearray(raw), len(raw)),
        ("wire, untouched", lambda: encode_sample(untouched), lambda: decode_sample(wire), len(wire)),
        ("wire, touched", lambda: encode_sample(sample), lambda: touch(decode_sample(wire)), len(wire)),
        ("pickle of Sample", lambda: pickle.dumps(sample, 5), lambda: touch(pickle.loads(ours)), len(ours)),
        ("pickle of a dataclass", lambda: pickle.dumps(plain, 5), lambda: touch(pickle.loads(pickled)), len(pickled)),
        ("json of a dataclass", lambda: to_json(plain), lambda: Plain(**json.loads(text)), len(text)),
    ]  # fmt: skip
    return [(name, microseconds(put, seconds), microseconds(get, seconds), size) for name, put, get, size in ways]


def print_samples(seconds: float) -> None:
    """Print one table for all lengths."""
    print(f"{'response tokens':>15}  {'way':<22}{'encode µs':>11}{'decode µs':>11}{'both / pickle':>15}{'kB':>9}")
    for length in (1024, 8192, 65536):
        rows = rows_of(length, seconds)
        base = next(put + get for name, put, get, _ in rows if name == "pickle of a dataclass")
        for name, put, get, size in rows:
            print(f"{length:>15}  {name:<22}{put:>11.1f}{get:>11.1f}{(put + get) / base:>15.3f}{size / 1000:>9.1f}")


def print_dump(samples: int, length: int) -> None:
    """Write a dump of `samples` in rollouts of 256, then read it three ways."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rollouts.dump")
        kinds = [a_sample(length, index) for index in range(256)]
        start = perf_counter()
        with DumpWriter(path, DumpHeader(kind="rollout", config={}, tokenizer="")) as writer:
            for first in range(0, samples, 256):
                batch = [copy.copy(one) for one in kinds[: samples - first]]
                groups = [RecordedGroup(samples=list(batch[at : at + 8])) for at in range(0, len(batch), 8)]
                writer.write(RecordedRollout(rollout_id=first // 256, groups=groups))
        wrote = perf_counter() - start
        size = path.stat().st_size / 1e6
        print(f"\na dump of {samples:,} samples of {length} tokens, {size:.0f} MB")
        print(f"{'write':<34}{wrote:>8.2f} s {size / wrote:>8.0f} MB/s {samples / wrote:>10,.0f} samples/s")
        base = 0.0
        for name, read in (
            ("read the file's bytes", lambda: _read_bytes(path)),
            ("read the samples, untouched", lambda: _read(path, lambda _: None)),
            ("read the samples and their columns", lambda: _read(path, touch)),
        ):
            seconds = min(_seconds(read) for _ in range(3))
            base = base or seconds
            print(f"{name:<34}{seconds:>8.2f} s {size / seconds:>8.0f} MB/s {samples / seconds:>10,.0f} samples/s"
                  f"   x {seconds / base:.1f}")  # fmt: skip


def _read_bytes(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def _read(path: Path, use: Callable[[Any], Any]) -> None:
    for record in read_dump(path):
        for group in record.groups:  # type: ignore[union-attr]
            for sample in group.samples:
                use(sample)


def _seconds(call: Callable[[], None]) -> float:
    gc.collect()
    start = perf_counter()
    call()
    return perf_counter() - start


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to measure each number")
    parser.add_argument("--samples", type=int, default=10_000, help="how many samples the dump holds")
    parser.add_argument("--length", type=int, default=1024, help="response tokens of the dump's samples")
    arguments = parser.parse_args()
    print(f"msgspec {msgspec.__version__}")
    print_samples(arguments.seconds)
    print_dump(arguments.samples, arguments.length)


if __name__ == "__main__":
    main()
