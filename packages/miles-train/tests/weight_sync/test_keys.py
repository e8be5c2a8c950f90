"""Engines that ask for a key get it with every request of a push, and nobody else does."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from miles_api.services import Endpoint
from miles_train.options import WeightSyncOptions
from miles_train.weight_sync.engine import RefusedError, ask, tell
from miles_train.weight_sync.frame import Push, Source
from miles_train.weight_sync.link import Bucket
from miles_train.weight_sync.plan import Plan, Sent
from miles_train.weight_sync.sent import SentWay
from miles_train.weight_sync.tensor import TensorLink

KEY = "of-the-engine"


@pytest.fixture
def serve():
    servers = []

    def start(redirect=""):
        """Start an engine that keeps what is shown to it, or sends its clients elsewhere; return address and list."""
        shown = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self):
                shown.append(self.headers["Authorization"])
                self.send_response(302 if redirect else 200 if shown[-1] == f"Bearer {KEY}" else 401)
                self.send_header("Location", redirect)
                body = b'{"success": true}'
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args): ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", shown

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_engine_is_shown_its_key_and_whoever_it_redirects_to_is_not(serve):
    url, shown = serve()
    assert ask(Endpoint(url=url, key=KEY), "/model_info") == {"success": True}
    tell(Endpoint(url=url, key=KEY), "/flush_cache", {})
    with pytest.raises(RefusedError, match="401"):
        ask(Endpoint(url=url), "/model_info")
    assert shown == [f"Bearer {KEY}", f"Bearer {KEY}", None]
    elsewhere, seen = serve()
    sends_away, _ = serve(redirect=elsewhere)
    with pytest.raises(RefusedError, match="401") as caught:
        ask(Endpoint(url=sends_away, key=KEY), "/model_info")
    assert seen == [None]
    assert KEY not in str(caught.value)


def test_the_ranks_that_send_tensors_show_each_engine_its_key(serve, tmp_path):
    url, shown = serve()
    plans: list[Plan] = []

    def send(plan):
        plans.append(plan)
        return Sent()

    source = Source(export=lambda *_: {}, score=lambda _: [], tokens=[], send=send)
    way = SentWay("tensor", source, tmp_path, WeightSyncOptions())
    way.deliver([Endpoint(url=url, key=KEY)], Push("1", due=False))
    assert KEY not in repr(plans)
    del shown[:]
    link = TensorLink()
    link.open(plans[0].receivers)
    link.put(Bucket([("a", torch.ones(3))], 12), {})
    link.wait()
    assert (link.gone, link.refused, shown) == ({}, {}, [f"Bearer {KEY}"])
    link.close()
    way.close()
