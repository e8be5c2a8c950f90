"""The `miles router` subcommand."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec

from miles_api.cli.command_parser import CommandParser
from miles_api.errors import ConfigError
from miles_api.options import field_docs, flag_of, option_kind

from . import hook_values
from .options import KEY_VARIABLE, TOKEN_VARIABLE, RouterOptions, short_flag

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RouterCommand", "command"]


class RouterCommand:
    """Serve one address for several inference engines."""

    help = "serve one address for several inference engines"

    def main(self, argv: Sequence[str], prog: str = "miles router") -> int:
        """Read the flags, those that the middleware brings among them, and serve; return the exit status."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        _add_middleware(first)
        references = _references(first.parse_known_args(argv)[0])
        parents = [options.parser for options in hook_values.brought_by(references)]
        parser = CommandParser(prog=prog, description=self.help, parents=parents)
        try:
            self.configure(parser)
        except argparse.ArgumentError as error:
            raise ConfigError(f"{', '.join(references)} brings an option that the router has: {error}") from error
        return self.run(parser.parse_args(argv))

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags to `parser`."""
        docs, default, hints = field_docs(RouterOptions), RouterOptions(), get_type_hints(RouterOptions)
        for field in RouterOptions.__struct_fields__:
            kind, shown = option_kind(hints[field]).base, getattr(default, field)
            text = docs[field] + ("" if shown is None else f" (default: {shown})")
            how: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
            if isinstance(kind, tuple):
                how = {"choices": kind}
            parser.add_argument(short_flag(field), flag_of(field), dest=field, default=shown, help=text, **how)
        parser.add_argument(
            "--worker", action="append", default=[], metavar="URL",
            help=f"an engine to start with (repeatable); the key it asks for is read from {KEY_VARIABLE}",
        )  # fmt: skip
        _add_middleware(parser)
        parser.add_argument(
            "--replay", metavar="FILE", help="answer from what the `recorder` middleware wrote; there are no engines"
        )
        # Router passes its own process id, so that the child can tell when it has been orphaned
        parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
        # and its listening socket, so that the port is never free between this process and one that replaces it
        parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)

    def run(self, namespace: argparse.Namespace) -> int:
        """Serve until interrupted. Raises `ConfigError` or `ServiceError` if it cannot start."""
        # every `miles` command builds this parser, and only this one needs a web server
        from .middleware import args_of, resolve_middleware  # noqa: PLC0415
        from .server import run_router  # noqa: PLC0415

        given = {name: getattr(namespace, name) for name in RouterOptions.__struct_fields__}
        given["router_token"] = given["router_token"] or os.environ.get(TOKEN_VARIABLE) or None
        try:
            options = msgspec.convert(given, RouterOptions)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"miles router: {exc}") from exc
        references = _references(namespace)
        # only whoever starts this process for a run sets them for it; what else stands there was left in a shell
        brought = None if namespace.parent_pid is None else hook_values.from_environment()
        if brought is None:
            brought = hook_values.from_flags(hook_values.brought_by(references), vars(namespace))
        middleware = resolve_middleware(references, args_of(options, brought))
        if namespace.replay is not None and namespace.worker:
            raise ConfigError("miles router: --replay answers by itself: leave --worker out")
        inherited = {"parent_pid": namespace.parent_pid, "fd": namespace.fd}
        key = os.environ.get(KEY_VARIABLE, "")
        run_router(options, namespace.worker, key, middleware=middleware, replay=namespace.replay, **inherited)
        return 0


def _add_middleware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--miles-router-middleware-paths", action="append", default=[], metavar="REFERENCE",
        help="middleware around the router, outermost first: a short name, pkg.mod:Class or path/file.py:Class, "
        "comma-separated or repeated; with --help, the options that it brings are shown too",
    )  # fmt: skip


def _references(namespace: argparse.Namespace) -> list[str]:
    parts = [part.strip() for given in namespace.miles_router_middleware_paths for part in given.split(",")]
    return [part for part in parts if part]


command = RouterCommand()
