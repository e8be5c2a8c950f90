"""As `python -m sglang.launch_server`: a server with a worker process beside it.

What it is to do wrong stands in environment variables: `STAND_IN_START` is `fail` or `hang`; a server with
`STAND_IN_STUBBORN` ignores SIGTERM. `POST /die` ends it with a few last words.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sglang.srt.server_args import ServerArgs


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    state: dict = {"paused": False}

    def lets_in(self):
        key = self.state.get("api_key")
        if not key or self.path == "/health" or self.headers["authorization"] == f"Bearer {key}":
            return True
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"error":"Unauthorized"}')
        return False

    def do_GET(self):
        if not self.lets_in():
            return None
        if self.path == "/server_info":
            return self.answer(self.state)
        if self.path == "/model_info":
            names = ("model_path", "tokenizer_path", "weight_version")
            return self.answer({"is_generation": True, **{name: self.state[name] for name in names}})
        return self.answer(None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.lets_in():
            return None
        if self.path == "/die":
            print(f"RuntimeError: out of memory (api_key={self.state['api_key']})", file=sys.stderr, flush=True)
            os._exit(3)
        if self.path == "/pause_generation":
            self.state["paused"] = True
        if self.path == "/continue_generation":
            self.state["paused"] = False
        if self.path == "/update_weights_from_disk":
            self.state |= {"weight_version": body["weight_version"], "model_path": body["model_path"]}
        if self.path == "/tokenize":
            return self.answer({"tokens": [ord(letter) for letter in body["prompt"]]})
        return self.answer({"success": True})

    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"" if value is None else json.dumps(value).encode())

    def log_message(self, *_):
        pass


def with_config(words):
    """Put the arguments of the file that `--config` names in front, as SGLang does."""
    if "--config" not in words:
        return words
    at = words.index("--config")
    given = json.loads(Path(words[at + 1]).read_text(encoding="utf-8"))
    return [*(word for name, value in given.items() for word in (f"--{name}", value)), *words[:at], *words[at + 2 :]]


def main():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(with_config(sys.argv[1:]))
    if os.environ.get("STAND_IN_STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ.get("STAND_IN_START") == "fail":
        sys.exit("ValueError: this model has no config.json")
    worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    if os.environ.get("STAND_IN_START") == "hang":
        time.sleep(600)
    shown = ("CUDA_VISIBLE_DEVICES", "SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
    Handler.state |= {
        **vars(args),
        "tokenizer_path": args.model_path,
        "argv": sys.argv[1:],
        "environment": {name: os.environ.get(name) for name in shown},
        "pids": [os.getpid(), worker.pid],
    }
    ThreadingHTTPServer.allow_reuse_address = True
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
