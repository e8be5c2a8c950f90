"""`python -m miles_rollout.engines.local`: serve one model directory over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvicorn
import uvloop

from miles_api import stacks
from miles_api.addresses import is_loopback
from miles_api.errors import ConfigError
from miles_rollout.engines.key import KEY_VARIABLE
from miles_rollout.engines.local.control import Control
from miles_rollout.engines.local.engine import Engine
from miles_rollout.engines.local.errors import CheckpointError, UnsupportedModelError
from miles_rollout.engines.local.generate import JobFactory
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.scheduler import Limits, Scheduler
from miles_rollout.engines.local.server import App
from miles_rollout.engines.local.tokenizer import TextCodec
from miles_rollout.engines.local.weights import check_model_dir

if TYPE_CHECKING:
    from miles_rollout.engines.local.jobs import News

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miles_rollout.engines.local", description=__doc__)
    add = parser.add_argument
    add("--model-path", required=True, help="Hugging Face directory: config.json, tokenizer, safetensors")
    host_help = f"any but a loopback address needs a key, in the environment variable {KEY_VARIABLE}"
    add("--host", default="127.0.0.1", help=host_help)
    add("--port", type=int, default=30000, help="0 takes a free one, named on stdout")
    add("--fd", type=int, default=None, help="a listening socket inherited from the parent, instead of host and port")
    add("--max-running-requests", type=int, default=256)
    add("--max-total-len", type=int, default=None, help="prompt plus response; by default the config's limit")
    add("--kv-gib", type=float, default=None, help="memory for keys and values; by default half of what is free")
    add("--seed", type=int, default=0, help="seeds the draws of requests that bring no sampling_seed")
    add("--impl", choices=("auto", "lean", "hf"), default="auto")
    add("--deterministic", action="store_true", help="answers depend on request and weights alone, to the bit")
    add("--parent-pid", type=int, default=None, help="exit when this is no longer the parent process")
    add("--await-weights", action="store_true", help="hold requests until a weight update or continue_generation")
    return parser


def _socket(args: argparse.Namespace, key: str) -> socket.socket:
    """Open or inherit the listening socket; without a key, whoever bound it, its address must be loopback."""
    if args.fd is not None:
        sock = socket.socket(fileno=args.fd)
        _check(sock, key)
        return sock
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((args.host, args.port))
        _check(sock, key)
        # Without this a second engine could bind the same port while the first one still loads its model.
        sock.listen(2048)
    except OSError as error:
        raise SystemExit(f"engine: cannot listen on {args.host}:{args.port}: {error.strerror or error}") from None
    return sock


def _check(sock: socket.socket, key: str) -> None:
    host = sock.getsockname()[0]
    if not (key or is_loopback(host)):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and an engine obeys whoever reaches it: put a key into "
            f"the environment variable {KEY_VARIABLE}, or listen on 127.0.0.1 or ::1"
        )


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _watch_parent(pid: int) -> None:
    """Exit with the parent: a killed parent cannot tell us, but our parent process id changes."""

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


async def _serve(args: argparse.Namespace, key: str, scheduler: Scheduler, sock: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    model = scheduler.model

    def on_news(news: News) -> None:
        loop.call_soon_threadsafe(app.deliver, news)

    engine = Engine(scheduler, on_news)
    info = {
        "model_path": args.model_path,
        "impl": model.impl,
        "deterministic": model.deterministic,
        "max_running_requests": args.max_running_requests,
        "max_total_len": model.max_positions,
        "seed": args.seed,
        "pid": os.getpid(),
    }
    limits = (model.vocab_size, model.max_positions)
    factory = JobFactory(scheduler.codec, *limits, args.seed, deterministic=model.deterministic)
    app = App(Control(engine, info), engine, factory, key)
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)

    def shut_down() -> None:
        server.should_exit = True

    engine.on_dead = lambda _: loop.call_soon_threadsafe(shut_down)
    engine.start()
    await server.serve(sockets=[sock])
    if engine.dead is not None:
        print(f"engine: stopped by {engine.dead!r}", file=sys.stderr, flush=True)
        return 1
    engine.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Load the model, then serve until told to stop; return the exit status."""
    args = _parser().parse_args(argv)
    stacks.register("engine")
    torch.set_num_threads(1)
    key = os.environ.get(KEY_VARIABLE, "")
    if args.parent_pid is not None:
        _watch_parent(args.parent_pid)
    try:
        sock = _socket(args, key)
        directory = check_model_dir(args.model_path)
        codec = TextCodec(Path(directory))
        with torch.inference_mode():
            model = load_model(directory, args.impl, args.max_total_len, deterministic=args.deterministic)
    except (CheckpointError, ConfigError, UnsupportedModelError) as error:
        print(f"engine: {error}", file=sys.stderr, flush=True)
        return 2
    kv_bytes = int(args.kv_gib * 2**30) if args.kv_gib is not None else _free_memory() // 2
    with torch.inference_mode():
        scheduler = Scheduler(model, codec, Limits(args.max_running_requests, kv_bytes))
    if args.await_weights:
        scheduler.await_weights()
    # What was imported lives for ever: collecting among it again and again costs milliseconds under load.
    gc.collect()
    gc.freeze()
    # The model thread gives the lock up at every operation; 5 ms to get it back is longer than a decode step.
    sys.setswitchinterval(0.001)
    host, port = sock.getsockname()[:2]
    print(f"engine: {model.impl} forward of {args.model_path} on http://{host}:{port}", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(args, key, scheduler, sock))


if __name__ == "__main__":
    sys.exit(main())
