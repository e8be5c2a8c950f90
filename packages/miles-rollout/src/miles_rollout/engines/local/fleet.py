"""Starts, pauses and replaces local engines, one process each; they die with the process that started them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from miles_api.errors import ServiceError
from miles_api.services import Endpoint, Placement

if TYPE_CHECKING:
    from miles_rollout.engines.local.options import LocalEngineOptions

__all__ = ["LocalFleet"]

_STOP_GRACE, _REQUEST_TIMEOUT, _POLL = 5.0, 30.0, 0.05
_TAIL_LINES = 20
_KEY_VARIABLE = "MILES_ENGINE_API_KEY"


@dataclass
class _Child:
    process: subprocess.Popen
    endpoint: Endpoint
    errors: IO[bytes]
    """Its stderr, a deleted temporary file."""

    def last_lines(self) -> str:
        """Return the end of what it wrote on stderr."""
        self.errors.flush()
        self.errors.seek(0)
        return "\n".join(self.errors.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])


class LocalFleet:
    """An `EngineFleet` of CPU engines on this machine."""

    def __init__(self, options: LocalEngineOptions, model_path: str, seed: int) -> None:
        self._options, self._model_path, self._seed = options, model_path, seed
        self._placements: list[Placement] = []
        self._children: list[_Child] = []

    def start(self, placements: list[Placement]) -> None:
        """Start one engine for each placement and wait until all answer.

        Raises:
            ServiceError: a placement has GPUs, or an engine died (with the end of its stderr) or took too long.
        """
        if any(placement.gpu_ids for placement in placements):
            raise ServiceError("the local engine runs on CPU threads; it cannot be placed on GPUs")
        self._placements = list(placements)
        try:
            self._children.extend(self._launch(index) for index in range(len(placements)))
            deadline = time.monotonic() + self._options.engine_start_timeout
            for index, child in enumerate(self._children):
                self._await_health(index, child, deadline)
        except BaseException:
            self.stop()
            raise

    def endpoints(self) -> list[Endpoint]:
        """Return every engine's address with the weight version it reports; a dead engine reports none."""
        return [_with_version(child) for child in self._children]

    def pause(self) -> None:
        """Stop every engine between two tokens; requests keep their place and their keys and values."""
        self._post_all("/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Let every engine go on."""
        self._post_all("/continue_generation", {})

    def restart(self, index: int) -> Endpoint:
        """Replace engine `index`; the new one keeps requests waiting until its weights are updated or it is resumed.

        Raises:
            ServiceError: it does not start.
        """
        _end(self._children[index])
        self._children[index] = child = self._launch(index, "--await-weights")
        self._await_health(index, child, time.monotonic() + self._options.engine_start_timeout)
        return child.endpoint

    def stop(self) -> None:
        """End every engine; may be called twice."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        for child in self._children:
            _end(child)
        self._children.clear()

    def _launch(self, index: int, *extra: str) -> _Child:
        options = self._options
        sock = self._listen(index)
        host, port = sock.getsockname()[:2]
        command = [sys.executable, "-m", "miles_rollout.engines.local", "--model-path", self._model_path]
        command += ["--host", options.engine_host, "--fd", str(sock.fileno()), "--impl", options.engine_impl]
        command += ["--max-running-requests", str(options.engine_max_running_requests)]
        command += ["--seed", str(self._seed * 1009 + index), "--parent-pid", str(os.getpid()), *extra]
        if options.engine_max_total_len is not None:
            command += ["--max-total-len", str(options.engine_max_total_len)]
        # A file, not a pipe: nobody has to read it while the engine runs.
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the engine has ended
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": "1"}
        with sock:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                pass_fds=(sock.fileno(),),
            )
        shown = f"[{host}]" if ":" in host else host
        endpoint = Endpoint(url=f"http://{shown}:{port}", node=self._placements[index].node)
        return _Child(process, endpoint, errors)

    def _listen(self, index: int) -> socket.socket:
        """Open the engine's socket here, so that no other process can take the port before it listens."""
        options = self._options
        port = 0 if options.rollout_engine_base_port is None else options.rollout_engine_base_port + index
        sock = socket.socket(socket.AF_INET6 if ":" in options.engine_host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((options.engine_host, port))
            sock.listen(2048)
        except OSError as error:
            sock.close()
            raise ServiceError(f"engine {index} cannot listen on {options.engine_host}:{port}: {error}") from None
        return sock

    def _await_health(self, index: int, child: _Child, deadline: float) -> None:
        while True:
            status = child.process.poll()
            if status is not None:
                raise ServiceError(f"engine {index} ended with status {status} at start:\n{child.last_lines()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServiceError(
                    f"engine {index} did not answer within {self._options.engine_start_timeout:g} s "
                    f"(--engine-start-timeout):\n{child.last_lines()}"
                )
            try:
                # The socket listens from the start, so this waits in its queue while the model loads.
                _request(child.endpoint.url + "/health", None, min(1.0, left))
                return
            except OSError:
                time.sleep(_POLL)

    def _post_all(self, path: str, body: dict[str, Any]) -> None:
        for index, child in enumerate(self._children):
            try:
                _request(child.endpoint.url + path, body, _REQUEST_TIMEOUT)
            except OSError as error:
                raise ServiceError(f"engine {index} at {child.endpoint.url} failed {path}: {error}") from error


def _request(url: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    if key := os.environ.get(_KEY_VARIABLE):
        request.add_header("authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        return json.loads(reply.read())


def _with_version(child: _Child) -> Endpoint:
    endpoint = child.endpoint
    version = ""
    if child.process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, TimeoutError):
            version = _request(endpoint.url + "/model_info", None, _REQUEST_TIMEOUT)["weight_version"]
    # SGLang's name for weights that were never synchronised.
    return Endpoint(url=endpoint.url, node=endpoint.node, weight_version="" if version == "default" else version)


def _end(child: _Child) -> None:
    child.process.terminate()
    try:
        child.process.wait(_STOP_GRACE)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
    child.errors.close()
