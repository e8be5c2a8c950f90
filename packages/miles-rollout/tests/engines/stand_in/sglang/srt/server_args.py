"""As SGLang's: a class with `add_cli_args`. `$STAND_IN_IMPORTS` names a file that grows with every import."""

import argparse
import os
from pathlib import Path

if "STAND_IN_IMPORTS" in os.environ:
    with Path(os.environ["STAND_IN_IMPORTS"]).open("a", encoding="utf-8") as file:
        file.write("imported\n")
if "STAND_IN_BROKEN" in os.environ:
    raise ImportError("libcudart.so.13: cannot open shared object file")


class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        add = parser.add_argument
        add("--model-path", "--model", required=True)
        add("--host", default="127.0.0.1")
        add("--port", type=int, default=30000)
        add("--tp-size", "--tensor-parallel-size", type=int, default=1)
        add("--nnodes", type=int, default=1)
        add("--node-rank", type=int, default=0)
        add("--dist-init-addr", "--nccl-init-addr")
        add("--device")
        add("--dtype", choices=["auto", "half", "float32"], default="auto")
        add("--mem-fraction-static", type=float)
        add("--max-total-tokens", type=int)
        add("--max-running-requests", type=int)
        add("--random-seed", type=int)
        add("--log-level", default="info")
        add("--weight-version", default="default")
        add("--api-key")
        add("--disable-radix-cache", action="store_true")
        add("--enable-memory-saver", action="store_true")
        add("--sleep-on-idle", action="store_true")
        add("--schedule-conservatively", action=argparse.BooleanOptionalAction)
        add("--cuda-graph-bs", type=int, nargs="+")
        add("--json-model-override-args", default="{}")
        add("--context-length", type=int)
