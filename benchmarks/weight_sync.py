"""Weights from a trainer to a local engine, by each way, against copying them in memory and reading them from a file.

    hatch run python benchmarks/weight_sync.py [--sizes 0.3M 10M 135M] [--pushes 5] [--profile]

One trainer rank and one engine on this machine, random weights in fp32; the 135 M model has SmolLM2-135M's shape. Ways
take turns, so that whatever else the machine does meets all of them. A push is what a run waits for: gather, send, put
in place, version, but not the check, which is timed on its own.

A second round of pushes crosses streamed requests: `gap` is the longest time between two tokens of any of them while
the push ran, beside the mean time between two tokens before it; `paused` is the time from the request that pauses the
engine to the answer of the one that lets it go on. `restart` is the time from an engine's death to the first token of
another one that has been given its weights.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import signal
import socket
import statistics
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from miles_api.checks.check import derive
from miles_api.loading.load import provider
from miles_api.parsing.parse import parse_run
from miles_api.services import Endpoint, Placement
from miles_train.options import WeightSyncOptions
from miles_train.trainer import Trainer
from miles_train.weight_sync import frame
from miles_train.weight_sync.disk import DiskWay, make_folder
from miles_train.weight_sync.frame import Source, WeightSync
from miles_train.weight_sync.sent import SentWay
from miles_train.weight_sync.verify import probe_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from miles_api.services import EngineFleet

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart" / "run.toml"
_SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "0.3M": {**_SMALL, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "10M": {**_SMALL, "hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6, "vocab_size": 4096},
    # SmolLM2-135M's.
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
WAYS = ("disk", "tensor", "broadcast")
CONTEXT, STREAMS, WARM = 2048, 4, 10
"""Tokens that the model holds, requests that a push crosses, and their tokens before and after it."""


def main() -> None:
    """Print a table row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--buffer", type=int, help="--update-weight-buffer-size in MiB; default: the option's")
    parser.add_argument("--profile", action="store_true", help="profile the pushes of each way instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            run_size(size, Path(folder), args.pushes, args.buffer, profile=args.profile)


def run_size(size: str, folder: Path, pushes: int, buffer: int | None, *, profile: bool) -> None:
    """Measure one model and print a line for each way and reference, or a profile for each way."""
    save_model(SHAPES[size], folder / "model")
    with started(folder) as (trainer, fleet):
        endpoint = fleet.endpoints()[0]
        vocabulary = SHAPES[size]["vocab_size"]
        syncs = {way: make_sync(way, trainer, endpoint, folder, vocabulary, buffer) for way in WAYS}
        versions = iter(range(1, 10_000))
        checked = {way: timed(sync.push, next(versions)) for way, sync in syncs.items()}
        if profile:
            for way, sync in syncs.items():
                print_profile(f"{size} {way}", lambda sync=sync: [sync.push(next(versions)) for _ in range(pushes)])
        else:
            measure(size, folder / "model", fleet, syncs, versions, checked, pushes)
        for sync in syncs.values():
            sync.close()


def measure(
    size: str,
    model: Path,
    fleet: EngineFleet,
    syncs: dict[str, WeightSync],
    versions: Iterator[int],
    checked: dict[str, float],
    pushes: int,
) -> None:
    """Let ways and references take turns; print medians."""
    calls: dict[str, Callable[[], Any]] = {way: (lambda s=sync: s.push(next(versions))) for way, sync in syncs.items()}
    calls |= references(model)
    seconds = {name: [] for name in calls}
    for _ in range(pushes):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    total = (model / "model.safetensors").stat().st_size
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        cells = [size, name, f"{1000 * median:.1f} ms", f"{total / median / 1e9:.2f} GB/s"]
        cells += [f"{median / medians[other]:.1f} × {other}" for other in ("memcpy", "read the file")]
        cells += [f"first push, with check, {1000 * checked[name]:.0f} ms"] if name in syncs else []
        print("|", " | ".join(cells), "|", flush=True)
    crossings = {name: [] for name in syncs}
    for _ in range(pushes):
        for name, each in crossings.items():
            each.append(crossing(fleet.endpoints()[0], calls[name]))
    for name, each in crossings.items():
        usual, gap, paused = (1000 * statistics.median(values) for values in zip(*each, strict=True))
        print(f"| {size} | {name} | gap {gap:.0f} ms (usually {usual:.1f}) | paused {paused:.0f} ms |", flush=True)
    for name in syncs:
        print(f"| {size} | {name} | restart {restart(fleet, syncs, name, next(versions)):.1f} s |", flush=True)


def references(model: Path) -> dict[str, Callable[[], Any]]:
    """Return what every way is measured against."""
    tensors = load_file(model / "model.safetensors")
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            into[name].copy_(tensor)

    def read() -> None:
        for name, tensor in load_file(model / "model.safetensors").items():
            into[name].copy_(tensor)

    return {"memcpy": copy, "read the file": read}


def crossing(endpoint: Endpoint, push: Callable[[], Any]) -> tuple[float, float, float]:
    """Push while requests are streamed; return (s) the mean time between two tokens before it, the longest time between
    two tokens that it crossed, and how long the engine was paused."""
    streams = [Stream(endpoint) for _ in range(STREAMS)]
    for stream in streams:
        stream.has(WARM)
    with noted() as asked:
        began = time.perf_counter()
        push()
        ended = time.perf_counter()
    for stream in streams:
        stream.has(len(stream.times) + WARM)
        stream.stop()
    gaps = [(before, after) for stream in streams for before, after in pairwise(stream.times)]
    usual = statistics.mean(after - before for before, after in gaps if after < began)
    longest = max(after - before for before, after in gaps if after > began and before < ended)
    return usual, longest, asked["/continue_generation"][1] - asked["/pause_generation"][0]


def restart(fleet: EngineFleet, syncs: dict[str, WeightSync], way: str, version: int) -> float:
    """Kill the engine; return (s) when another one in its place has the weights and has answered a request."""
    syncs[way].push(version)
    old = fleet.endpoints()[0]
    with urllib.request.urlopen(old.url + "/server_info", timeout=60) as reply:
        process = json.load(reply)["pid"]
    began = time.perf_counter()
    os.kill(process, signal.SIGKILL)
    new = fleet.restart(0)
    for sync in syncs.values():
        sync.replace(old, new)
    syncs[way].bring(new)
    stream = Stream(new)
    stream.has(1)
    ended = time.perf_counter()
    stream.stop()
    return ended - began


@contextmanager
def noted() -> Iterator[dict[str, tuple[float, float]]]:
    """Note when the requests that a push sends to the engine itself began and ended."""
    asked: dict[str, tuple[float, float]] = {}
    real = frame.ask

    def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> Any:
        began = time.perf_counter()
        answer = real(endpoint, path, body)
        asked[path] = (began, time.perf_counter())
        return answer

    frame.ask = ask
    try:
        yield asked
    finally:
        frame.ask = real


class Stream:
    """One streamed request and when its tokens came, until `stop`."""

    def __init__(self, endpoint: Endpoint) -> None:
        sampling = {"max_new_tokens": CONTEXT - 8, "ignore_eos": True}
        body = json.dumps({"input_ids": [1, 2, 3], "sampling_params": sampling, "stream": True}).encode()
        headers = {"content-type": "application/json"}
        self._request = urllib.request.Request(endpoint.url + "/generate", body, headers)
        self.times: list[float] = []
        self._more = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with urllib.request.urlopen(self._request, timeout=600) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    with self._more:
                        self.times.append(time.perf_counter())
                        self._more.notify_all()
                if self._stopped:
                    return

    def has(self, count: int) -> None:
        """Wait until so many tokens have come."""
        with self._more:
            while len(self.times) < count:
                if not self._thread.is_alive():
                    raise SystemExit("a request ended before the push did: let it be longer")
                self._more.wait(1)

    def stop(self) -> None:
        """Leave; the engine drops the request."""
        self._stopped = True
        self._thread.join()


def make_sync(
    way: str, trainer: Trainer, endpoint: Endpoint, folder: Path, vocab_size: int, buffer: int | None
) -> WeightSync:
    def export(directory: str, hashed: bool) -> dict[str, str]:
        return trainer.export(directory, weights_only=True, checksums=hashed)

    tokens = probe_tokens(vocab_size)
    source = Source(export, trainer.score, tokens, trainer.send_weights, trainer.snapshot)
    options = WeightSyncOptions(weight_check_interval=0, pause_generation_mode="in_place")
    if buffer is not None:
        options = msgspec.structs.replace(options, update_weight_buffer_size=buffer * 2**20)
    place = make_folder((folder / "model" / "model.safetensors").stat().st_size, None, fallback=folder)
    chosen = DiskWay(source, place, "in_place") if way == "disk" else SentWay(way, source, place, options)
    return WeightSync(chosen, source, [endpoint], options, patience=0.0)


@contextmanager
def started(folder: Path) -> Iterator[tuple[Trainer, EngineFleet]]:
    """Start one engine and one trainer rank on the model in `folder`."""
    words = [str(QUICKSTART), "--hf-checkpoint", folder / "model", "--run-dir", folder / "run", "--lr", 1e-4]
    config = derive(parse_run([str(word) for word in [*words, "--engine-max-total-len", CONTEXT]]))
    fleet = provider("miles.services", "engines")(config)
    fleet.start([Placement()])
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    place = {"master_addr": "127.0.0.1", "master_port": port, "listen_fd": listener.detach()}
    trainer = Trainer(config, rank=0, world_size=1, **place)
    trainer.start()
    try:
        yield trainer, fleet
    finally:
        trainer.stop()
        fleet.stop()


def save_model(shape: dict[str, Any], directory: Path) -> None:
    """Write random weights, and a tokenizer that nobody uses."""
    torch.manual_seed(0)
    kind = Qwen3Config if "head_dim" in shape else LlamaConfig
    config = kind(**shape, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words = {f"w{index}": index for index in range(8)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2").save_pretrained(directory)


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    started_at = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started_at


def print_profile(name: str, call: Callable[[], Any]) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(call)
    print(name)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
