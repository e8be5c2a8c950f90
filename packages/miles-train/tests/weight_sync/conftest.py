"""Engines that answer what a test wants, and a trainer whose weights are two numbers."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from miles_api.checksum import CHECKSUM
from miles_api.services import Endpoint
from miles_train.options import WeightSyncOptions
from miles_train.weight_sync.disk import DiskWay
from miles_train.weight_sync.frame import Source, WeightSync

TOKENS = [[1, 2, 3], [4, 5]]
SUMS = {"embed": "aa", "norm": "bb"}


class FakeEngine:
    """Serves the version it was told; what it says can be changed attribute by attribute."""

    def __init__(self):
        self.seen, self.version, self.stuck_at = [], "default", None
        self.answer = (200, {"success": True})
        self.checks = (200, {"success": True, "checksums": dict(SUMS), "checksum_of": CHECKSUM})
        self.tokens, self.log_prob = TOKENS, -1.0
        self.replies = {}
        """What is answered to some paths, as status and body."""
        self.dies_at = None
        """Connections break from the first request of this path on."""
        self.endpoint = None

    def paths(self):
        return [path for path, _ in self.seen]

    def requests(self, path):
        return [body for seen, body in self.seen if seen == path]

    def reply(self, path, body):
        self.seen.append((path, body))
        if path in self.replies:
            return self.replies[path]
        if path == "/update_weights_from_disk":
            self.version = body["weight_version"]
            return self.answer
        if path == "/model_info":
            return 200, {"weight_version": self.stuck_at or self.version}
        if path == "/server_info":
            return 200, {}
        if path == "/weights_checker":
            return self.checks
        logs = [[[None, ids[0], None], *([self.log_prob, token, None] for token in ids[1:])] for ids in self.tokens]
        return 200, [{"meta_info": {"input_token_logprobs": entries}} for entries in logs]

    def serve(self, stack):
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def do_GET(self):
                self.respond(None)

            def respond(self, body):
                if engine.dies_at in (self.path, "everywhere"):
                    engine.dies_at = "everywhere"
                    return
                status, content = engine.reply(self.path, body)
                encoded = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, *args): ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        self.endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}")


class FakeTrainer:
    """Writes a config and nothing else; counts how often it was asked for log-probs."""

    def __init__(self):
        self.scored, self.fails, self.dtype = 0, None, "float32"

    def export(self, directory, checksums):
        Path(directory, "config.json").write_text(json.dumps({"dtype": self.dtype}))
        if self.fails:
            raise self.fails
        return dict(SUMS) if checksums else {}

    def score(self, tokens):
        self.scored += 1
        return [[-1.0] * (len(sequence) - 1) for sequence in tokens]


@pytest.fixture
def new_engine():
    with ExitStack() as stack:

        def make():
            engine = FakeEngine()
            engine.serve(stack)
            return engine

        yield make


@pytest.fixture
def engines(new_engine):
    return [new_engine(), new_engine()]


@pytest.fixture
def trainer():
    return FakeTrainer()


@pytest.fixture
def make_sync(engines, trainer, tmp_path):
    """Return a function that makes the synchronisation of `engines`; options are those of `WeightSyncOptions`."""
    made = []

    def make(patience=0.0, **options):
        folder = tmp_path / f"weights{len(made)}"
        folder.mkdir()
        source = Source(export=trainer.export, score=trainer.score, tokens=TOKENS)
        endpoints = [engine.endpoint for engine in engines]
        options = WeightSyncOptions(**options)
        way = DiskWay(source, folder, options.pause_generation_mode)
        sync = WeightSync(way, source, endpoints, options, patience=patience)
        made.append((sync, folder))
        return sync

    yield make
    for sync, folder in made:
        sync.close()
        assert not folder.exists()
