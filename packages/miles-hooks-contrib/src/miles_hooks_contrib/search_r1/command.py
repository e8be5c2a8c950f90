"""The `miles retrieval-server` subcommand."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from miles_api.addresses import is_loopback
from miles_api.errors import ConfigError
from miles_hooks_contrib.search_r1.retrieval import load

if TYPE_CHECKING:
    import argparse

__all__ = ["RetrievalServerCommand", "command"]

TOKEN_VARIABLE = "MILES_RETRIEVAL_TOKEN"


class RetrievalServerCommand:
    """Serve a corpus to `--search-url`, and to any client of Search-R1's retrieval server."""

    help = "serve passages of a JSONL file to Search-R1"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags to `parser`."""
        parser.add_argument(
            "corpus", metavar="CORPUS", help="JSONL file of passages: `contents`, or `title` and `text`"
        )
        parser.add_argument(
            "--host", default="127.0.0.1", help="address to listen on; beyond loopback it needs a token (%(default)s)"
        )
        parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (%(default)s)")
        parser.add_argument("--topk", type=int, default=3, help="passages for a query that names no topk (%(default)s)")
        parser.add_argument(
            "--token",
            default=os.environ.get(TOKEN_VARIABLE),
            help=f"bearer token that is asked for (${TOKEN_VARIABLE})",
        )

    def run(self, namespace: argparse.Namespace) -> int:
        """Serve until interrupted. Raises `ConfigError`, `DataError` or `ServiceError` if it cannot start."""
        if namespace.token is None and not is_loopback(namespace.host):
            raise ConfigError(
                f"--host {namespace.host} lets other machines search the corpus: pass --token, or set "
                f"{TOKEN_VARIABLE}, or listen on 127.0.0.1"
            )
        if namespace.topk < 1:
            raise ConfigError(f"--topk {namespace.topk}: expected at least 1")
        # A web server and an index, which every other `miles` command does without.
        bm25, server = load("bm25", "bm25s"), load("server", "aiohttp")
        server.serve(
            bm25.Bm25(namespace.corpus), namespace.host, namespace.port, namespace.topk, namespace.token or None
        )
        return 0


command = RetrievalServerCommand()
