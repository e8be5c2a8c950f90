"""The `miles router` subcommand."""

from __future__ import annotations

import argparse
import os
from typing import get_args, get_type_hints

import msgspec

from miles_api.errors import ConfigError
from miles_api.options import field_docs

from .options import TOKEN_VARIABLE, RouterOptions

__all__ = ["RouterCommand", "command"]


class RouterCommand:
    """Serve one address for several inference engines."""

    help = "serve one address for several inference engines"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags to `parser`."""
        docs, default = field_docs(RouterOptions), RouterOptions()
        policies = get_args(get_type_hints(RouterOptions)["router_policy"])

        def add(flag: str, alias: str, field: str, **how: object) -> None:
            shown = getattr(default, field)
            text = docs[field] + ("" if shown is None else f" (default: {shown})")
            parser.add_argument(flag, alias, dest=field, default=shown, help=text, **how)  # type: ignore[arg-type]

        add("--host", "--sglang-router-ip", "sglang_router_ip", metavar="ADDRESS")
        add("--port", "--sglang-router-port", "sglang_router_port", type=int)
        add("--policy", "--router-policy", "router_policy", choices=policies)
        add("--health-interval", "--router-health-interval", "router_health_interval", type=float, metavar="SECONDS")
        add("--request-timeout", "--router-request-timeout", "router_request_timeout", type=float, metavar="SECONDS")
        add("--max-body-bytes", "--router-max-body-bytes", "router_max_body_bytes", type=int, metavar="BYTES")
        add("--token", "--router-token", "router_token", metavar="TOKEN")
        parser.add_argument(
            "--worker", action="append", default=[], metavar="URL", help="an engine to start with (repeatable)"
        )
        parser.add_argument(
            "--miles-router-middleware-paths", action="append", default=[], metavar="REFERENCE",
            help="middleware around the router, outermost first: pkg.mod:Class or path/file.py:Class, comma-separated "
            "or repeated",
        )  # fmt: skip
        # Router passes its own process id, so that the child can tell when it has been orphaned
        parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
        # and its listening socket, so that the port is never free between this process and one that replaces it
        parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)

    def run(self, namespace: argparse.Namespace) -> int:
        """Serve until interrupted. Raises `ConfigError` or `ServiceError` if it cannot start."""
        # every `miles` command builds this parser, and only this one needs a web server
        from .middleware import resolve_middleware  # noqa: PLC0415
        from .server import run_router  # noqa: PLC0415

        given = {name: getattr(namespace, name) for name in RouterOptions.__struct_fields__}
        given["router_token"] = given["router_token"] or os.environ.get(TOKEN_VARIABLE) or None
        try:
            options = msgspec.convert(given, RouterOptions)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"miles router: {exc}") from exc
        references = [part.strip() for given in namespace.miles_router_middleware_paths for part in given.split(",")]
        middleware = resolve_middleware(filter(None, references))
        inherited = {"parent_pid": namespace.parent_pid, "fd": namespace.fd}
        run_router(options, namespace.worker, middleware=middleware, **inherited)
        return 0


command = RouterCommand()
