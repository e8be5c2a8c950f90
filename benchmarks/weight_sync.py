"""Weights from a trainer to a local engine, by each way, against copying them in memory and reading them from a file.

    hatch run python benchmarks/weight_sync.py [--sizes 0.3M 10M 135M] [--pushes 5] [--profile]

One trainer rank and one engine on this machine, random Qwen3 weights in fp32. Ways take turns, so that whatever else
the machine does meets all of them. A push is what a run waits for: gather, send, put in place, version, but not the
check, which is timed on its own. The pause is what a streamed request that a push crosses waits for its first token
from the new weights, beyond the median time between two tokens.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
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

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api.checks.check import derive
from miles_api.loading.load import provider
from miles_api.parsing.parse import parse_run
from miles_api.services import Endpoint, Placement
from miles_train.options import WeightSyncOptions
from miles_train.trainer import Trainer
from miles_train.weight_sync.disk import DiskWay, make_folder
from miles_train.weight_sync.frame import Source, WeightSync
from miles_train.weight_sync.sent import SentWay
from miles_train.weight_sync.verify import probe_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart" / "run.toml"
SHAPES: dict[str, dict[str, Any]] = {
    "0.3M": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64},
    "10M": {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6, "vocab_size": 4096},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
}
WAYS = ("disk", "tensor", "broadcast")
CROSSED = {"0.3M": 1500, "10M": 600, "135M": 150}
"""Tokens of a request that a push crosses."""
CONTEXT, WARM = 2048, 10
"""Tokens that the model holds, and that come before the push begins."""


def main() -> None:
    """Print a table row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="profile the pushes of each way instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            run_size(size, Path(folder), args.pushes, profile=args.profile)


def run_size(size: str, folder: Path, pushes: int, *, profile: bool) -> None:
    """Measure one model and print a line for each way and reference, or a profile for each way."""
    save_model(SHAPES[size], folder / "model")
    with started(folder) as (trainer, endpoint):
        syncs = {way: make_sync(way, trainer, endpoint, folder, SHAPES[size]["vocab_size"]) for way in WAYS}
        versions = iter(range(1, 10_000))
        checked = {way: timed(sync.push, next(versions)) for way, sync in syncs.items()}
        if profile:
            for way, sync in syncs.items():
                print_profile(f"{size} {way}", lambda sync=sync: [sync.push(next(versions)) for _ in range(pushes)])
        else:
            measure(size, folder / "model", endpoint, syncs, versions, checked, pushes)
        for sync in syncs.values():
            sync.close()


def measure(
    size: str,
    model: Path,
    endpoint: Endpoint,
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
    pauses = {name: [] for name in syncs}
    for _ in range(pushes):
        for name, each in pauses.items():
            each.append(pause_seen(endpoint, calls[name], CROSSED[size]))
    total = (model / "model.safetensors").stat().st_size
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        line = f"{size} {name}: {1000 * median:.1f} ms, {total / median / 1e9:.2f} GB/s"
        line += f", {median / medians['memcpy']:.1f} × memcpy"
        if name in syncs:
            pause = statistics.median(pauses[name])
            line += f", pause {1000 * pause:.0f} ms, first push with check {1000 * checked[name]:.0f} ms"
        print(line, flush=True)


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


def pause_seen(endpoint: Endpoint, push: Callable[[], Any], tokens: int) -> float:
    """Stream one request and push after its first tokens; return by how much (s) the first token from the new weights
    came later after the one before than tokens do in the median."""
    sampling = {"max_new_tokens": tokens, "ignore_eos": True}
    body = json.dumps({"input_ids": [1, 2, 3], "sampling_params": sampling, "stream": True}).encode()
    request = urllib.request.Request(endpoint.url + "/generate", body, {"content-type": "application/json"})
    thread = threading.Thread(target=push)
    seen: list[tuple[float, str]] = []
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                seen.append((now, json.loads(line[6:])["meta_info"]["weight_version"]))
                if len(seen) == WARM:
                    thread.start()
    thread.join()
    gaps = [(after[0] - before[0], after[1] != before[1]) for before, after in pairwise(seen)]
    crossing = [gap for gap, crosses in gaps if crosses]
    if not crossing:
        raise SystemExit("the request ended before the push did: let it be longer")
    return max(crossing) - statistics.median(gap for gap, _ in gaps)


def make_sync(way: str, trainer: Trainer, endpoint: Endpoint, folder: Path, vocab_size: int) -> WeightSync:
    def export(directory: str, hashed: bool) -> dict[str, str]:
        return trainer.export(directory, weights_only=True, checksums=hashed)

    tokens = probe_tokens(vocab_size)
    source = Source(export, trainer.score, tokens, trainer.send_weights, trainer.snapshot)
    options = WeightSyncOptions(weight_check_interval=0, pause_generation_mode="in_place")
    place = make_folder((folder / "model" / "model.safetensors").stat().st_size, None, fallback=folder)
    chosen = DiskWay(source, place, "in_place") if way == "disk" else SentWay(way, source, place, options)
    return WeightSync(chosen, source, [endpoint], options, patience=0.0)


@contextmanager
def started(folder: Path) -> Iterator[tuple[Trainer, Endpoint]]:
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
        yield trainer, fleet.endpoints()[0]
    finally:
        trainer.stop()
        fleet.stop()


def save_model(shape: dict[str, Any], directory: Path) -> None:
    """Write random weights, and a tokenizer that nobody uses."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(**shape, **heads, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(directory)
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
