"""The router as the driver sees it: a child process that is started, told about engines, and stopped."""

from __future__ import annotations

import collections
import http.client
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec

from miles_api.errors import ServiceError
from miles_api.loading.hookset import configured_hooks

from . import hook_values
from .listening import bind
from .options import (
    MIDDLEWARE_HOOK,
    READY_PREFIX,
    REPORT_PATH,
    TOKEN_VARIABLE,
    RouterOptions,
    check_binding,
    short_flag,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from miles_api.config import RunConfig
    from miles_api.services import Endpoint

__all__ = ["Router", "create"]

_log = logging.getLogger("miles_router")

_START_DEADLINE_S = 60.0
_STOP_MARGIN_S = 3.0
_LAST_WORDS_S = 2.0
_CALL_TIMEOUT_S = 10.0
_POLL_S = 0.02
_OK = 200
_NOT_FOUND = 404
_STOPPED = "the router was stopped"


def create(config: RunConfig) -> Router:
    """Return the router of a run; nothing starts yet."""
    references = configured_hooks(config.args).get(MIDDLEWARE_HOOK, [])
    return Router(config.group(RouterOptions), references, hook_values.from_run(config, references))


class Router:
    """A `miles_api.services.RouterService` that runs `python -m miles_router` and ends with its process."""

    def __init__(
        self, options: RouterOptions, middleware: Sequence[str] = (), hook_options: Mapping[str, Any] | None = None
    ) -> None:
        """Check the options; `middleware` are references, which the child resolves. Raises `ConfigError`.

        `hook_options` are those that the middleware brings; left out, they have their defaults.
        """
        check_binding(options)
        self._options = options
        self._middleware = list(middleware)
        self._brought = hook_values.to_environment(hook_options or {})
        self._lock = threading.Lock()  # `stop` may come from another thread while `start` waits
        self._stopped = False
        # held here as long as the router is wanted: while its process is replaced nobody else can take the port
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[str] | None = None
        self._url = ""
        self._errors: collections.deque[str] = collections.deque(maxlen=30)
        self._readers: list[threading.Thread] = []

    def start(self) -> str:
        """Start the child and return its base URL once it answers.

        Raises `ServiceError` if the port is taken, with the child's last words if it dies, if it says nothing until
        the deadline, or if `stop` is called before or meanwhile.
        """
        try:
            self._launch()
        except BaseException:
            self._end()
            self._close()
            raise
        return self._url

    def dead(self) -> str:
        """Say how the child died by itself and what it said last; an empty string if it did not."""
        process = self._process
        if self._stopped or process is None or process.poll() is None:
            return ""
        return f"the router (pid {process.pid}) died with exit code {process.returncode}: {self._said()}"

    def restart(self) -> None:
        """Replace a dead child at the same address; the new one knows no engine. Raises as `start` does.

        Who connects meanwhile waits for it.
        """
        self._end()
        self._launch()

    def register(self, endpoint: Endpoint) -> None:
        """Send requests to an engine from now on.

        Called again for a known engine, it clears a quarantine and replaces the weight version that the engine has
        to show before it is re-admitted after a failure. Raises `ServiceError`.
        """
        body = {"url": endpoint.url, "weight_version": endpoint.weight_version, "api_key": endpoint.key or None}
        self._call("POST", "/workers", body)

    def unregister(self, endpoint: Endpoint) -> None:
        """Send an engine nothing more; what it works on finishes. An unknown engine is no error."""
        self._call("POST", f"/remove_worker?url={quote(endpoint.url, safe='')}", missing_ok=True)

    def require_weights(self, version: str) -> None:
        """Send requests only to engines that serve these weights from now on; each is asked before this returns.

        One that serves others, or that registers with others, gets nothing until it has caught up. Raises
        `ServiceError`.
        """
        self._call("POST", "/weight_version", {"weight_version": version})

    def report(self) -> list[dict[str, Any]]:
        """Say which middleware the child has loaded, from where, and how it fared; asks it. Raises `ServiceError`."""
        return msgspec.json.decode(self._call("GET", REPORT_PATH))["hooks"] if self._middleware else []

    def stop(self) -> None:
        """End the child, for good; safe to call twice, before `start`, or while another thread is in it."""
        with self._lock:
            self._stopped = True
        self._end()
        self._close()

    def _launch(self) -> None:
        process = self._spawn()
        self._wait_ready(process)

    def _spawn(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise ServiceError(_STOPPED)
            if self._process is not None:
                raise ServiceError("the router is already started")
            self._url = ""
            self._errors.clear()
            if self._socket is None:
                self._socket = bind(self._options.sglang_router_ip, self._options.sglang_router_port)
            descriptor = self._socket.fileno()
            # a session of its own: Ctrl-C is for the driver, which still needs the router while it shuts down
            self._process = process = subprocess.Popen(
                self._command_line(descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=self._environment(),
                pass_fds=(descriptor,),
                start_new_session=True,
            )
            self._readers = [
                self._read(process.stdout, self._on_line),
                self._read(process.stderr, self._on_error),
            ]
            return process

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(self._options.router_drain_timeout + _STOP_MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._hear_out()

    def _close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None

    def _command_line(self, descriptor: int) -> list[str]:
        options = self._options
        left_out = ("sglang_router_port", "router_token")  # the child inherits the one, the environment holds the other
        fields = [field for field in RouterOptions.__struct_fields__ if field not in left_out]
        flags = {short_flag(field): getattr(options, field) for field in fields}
        flags |= {"--fd": descriptor, "--parent-pid": os.getpid()}
        middleware = [f"--miles-router-middleware-paths={reference}" for reference in self._middleware]
        settings = [f"{flag}={value}" for flag, value in flags.items()]
        return [sys.executable, "-P", "-m", "miles_router", *settings, *middleware]

    def _environment(self) -> dict[str, str]:
        ours = (TOKEN_VARIABLE, hook_values.VALUES_VARIABLE)
        environment = {name: value for name, value in os.environ.items() if name not in ours} | self._brought
        if self._options.router_token is not None:
            environment[TOKEN_VARIABLE] = self._options.router_token
        # the child must find the packages of this process, however this process found them
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        return environment

    def _read(self, stream: IO[str] | None, take: collections.abc.Callable[[str], None]) -> threading.Thread:
        def drain() -> None:
            with stream:  # type: ignore[union-attr]
                for line in stream:  # type: ignore[union-attr]
                    take(line.rstrip("\n"))

        thread = threading.Thread(target=drain, name="miles-router-output", daemon=True)
        thread.start()
        return thread

    def _on_line(self, line: str) -> None:
        if line.startswith(READY_PREFIX) and not self._url:
            self._url = line.removeprefix(READY_PREFIX)
        else:  # what a middleware prints
            print(f"miles-router: {line}", flush=True)

    def _on_error(self, line: str) -> None:
        self._errors.append(line)
        if self._url:  # while starting, what it says goes into the error
            _log.warning("%s", line.removeprefix("miles-router: "))

    def _wait_ready(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + _START_DEADLINE_S
        while not self._url:
            ended = process.poll() is not None  # asked first: `stop` says so before it ends the child
            if self._stopped:
                raise ServiceError(_STOPPED)
            if ended:
                self._hear_out()
                raise ServiceError(
                    f"the router ended with status {process.returncode} while starting:\n  {self._said()}"
                )
            if time.monotonic() > deadline:
                raise ServiceError(f"the router was not ready after {_START_DEADLINE_S:g} s:\n  {self._said()}")
            time.sleep(_POLL_S)
        self._call("GET", "/health")

    def _hear_out(self) -> None:
        """Read what an ended child had said; not to the end where a process that middleware started goes on."""
        deadline = time.monotonic() + _LAST_WORDS_S
        for reader in self._readers:
            reader.join(max(deadline - time.monotonic(), 0.0))

    def _said(self) -> str:
        return "\n  ".join(list(self._errors)) or "(nothing on stderr)"

    def _call(self, method: str, path: str, body: object = None, *, missing_ok: bool = False) -> str:
        if self._process is None:
            raise ServiceError(_STOPPED if self._stopped else "the router is not started")
        # the port takes connections without the child too, and they would wait for one that replaces it
        if dead := self.dead():
            raise ServiceError(f"{dead}\n  it cannot be asked for {method} {path}")
        parts = urlsplit(self._url)
        headers = {"content-type": "application/json"}
        if self._options.router_token is not None:
            headers["authorization"] = f"Bearer {self._options.router_token}"
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=_CALL_TIMEOUT_S)
        try:
            connection.request(method, path, None if body is None else msgspec.json.encode(body), headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as exc:
            state = self.dead() or "its process runs"
            raise ServiceError(f"the router at {self._url} does not answer {method} {path}: {exc}; {state}") from exc
        finally:
            connection.close()
        if response.status != _OK and not (missing_ok and response.status == _NOT_FOUND):
            raise ServiceError(f"the router answered {method} {path} with {response.status}: {text}")
        return text
