"""Starts, pauses and replaces local engines, one process each; they die with the process that started them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError
from miles_api.services import Endpoint, Placement
from miles_rollout.engines.local.child import Child
from miles_rollout.engines.local.options import check_loopback

if TYPE_CHECKING:
    from miles_rollout.engines.local.options import LocalEngineOptions

__all__ = ["LocalFleet"]

_REQUEST_TIMEOUT, _POLL = 30.0, 0.05
_LAST_PORT = 65535


class LocalFleet:
    """An `EngineFleet` of CPU engines on this machine, for one start and one stop.

    An engine that dies by itself, once it has answered, is reported on stderr with its last words.
    """

    def __init__(self, options: LocalEngineOptions, model_path: str, seed: int, *, deterministic: bool = False) -> None:
        """Check the address; nothing starts yet. Raises `ConfigError` unless `--engine-host` is loopback."""
        check_loopback(options.engine_host)
        self._options, self._model_path, self._seed = options, model_path, seed
        self._deterministic = deterministic
        self._placements: list[Placement] = []
        self._children: list[Child] = []
        self._replaced = 0
        self._stopped = threading.Event()
        # held while an engine is added: `stop`, which may come from another thread, finds all or prevents it
        self._lock = threading.Lock()

    def start(self, placements: list[Placement]) -> None:
        """Start one engine for each placement and wait until all answer.

        Raises:
            ServiceError: a placement has GPUs, an engine died (with the end of its stderr) or took too long, or
                `stop` was called before or meanwhile.
        """
        if any(placement.gpu_ids for placement in placements):
            raise ServiceError("the local engine runs on CPU threads; it cannot be placed on GPUs")
        if self._children:
            raise ServiceError("the engines are already started")
        self._placements = list(placements)
        try:
            children = [self._launch(index) for index in range(len(placements))]
            deadline = time.monotonic() + self._options.engine_start_timeout
            for child in children:
                self._await_health(child, deadline)
            self._refuse_if_stopped()
        except BaseException:
            self._end_all()
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
            ServiceError: it does not start, or `stop` was called before or meanwhile.
        """
        with self._lock:
            self._refuse_if_stopped()
            old = self._children[index]
            self._replaced += 1
        old.end()
        child = self._launch(index, "--await-weights")
        self._await_health(child, time.monotonic() + self._options.engine_start_timeout)
        return child.endpoint

    def dead(self) -> dict[int, str]:
        """Return, for each engine that died by itself, its exit code and last words; by index."""
        return {child.index: text for child in list(self._children) if (text := child.why_dead())}

    def stop(self) -> None:
        """End every engine, for good; may be called twice, before `start`, or while another thread is in it."""
        self._stopped.set()
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            children, self._children = self._children, []
        for child in children:
            child.tell_to_end()
        for child in children:
            child.end()

    def _refuse_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise ServiceError("the engines were stopped")

    def _launch(self, index: int, *extra: str) -> Child:
        """Start an engine at place `index`."""
        with self._lock:
            self._refuse_if_stopped()
            child = self._spawn(index, *extra)
            self._children[index : index + 1] = [child]
        return child

    def _spawn(self, index: int, *extra: str) -> Child:
        options = self._options
        sock = self._listen(index)
        host, port = sock.getsockname()[:2]
        command = [sys.executable, "-m", "miles_rollout.engines.local", "--model-path", self._model_path]
        command += ["--host", options.engine_host, "--fd", str(sock.fileno()), "--impl", options.engine_impl]
        command += ["--max-running-requests", str(options.engine_max_running_requests)]
        # another one after a restart: requests without a seed must not be answered with the same draws again
        seed = self._seed * 1009 + index + 1_000_003 * self._replaced
        command += ["--seed", str(seed), "--parent-pid", str(os.getpid()), *extra]
        if options.engine_max_total_len is not None:
            command += ["--max-total-len", str(options.engine_max_total_len)]
        if self._deterministic:
            command.append("--deterministic")
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
                # Ctrl-C is for the driver, which then stops its engines; they are not to die on their own first
                start_new_session=True,
            )
        shown = f"[{host}]" if ":" in host else host
        endpoint = Endpoint(url=f"http://{shown}:{port}", node=self._placements[index].node)
        return Child(index, process, endpoint, errors)

    def _listen(self, index: int) -> socket.socket:
        """Open the engine's socket here, so that no other process can take the port before it listens."""
        options = self._options
        port = 0 if options.rollout_engine_base_port is None else options.rollout_engine_base_port + index
        if port > _LAST_PORT:
            raise ServiceError(f"--rollout-engine-base-port leaves no port for engine {index}: {port} is not one")
        sock = socket.socket(socket.AF_INET6 if ":" in options.engine_host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((options.engine_host, port))
            sock.listen(2048)
        except OSError as error:
            sock.close()
            raise ServiceError(_cannot_listen(index, options, port, error)) from None
        return sock

    def _await_health(self, child: Child, deadline: float) -> None:
        """Wait until `child` answers, and watch it from then on."""
        while True:
            status = child.process.poll()  # asked first: `stop` says so before it ends a child
            self._refuse_if_stopped()
            if status is not None:
                raise ServiceError(f"engine {child.index} ended with status {status} at start:\n{child.last_lines()}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServiceError(
                    f"engine {child.index} did not answer within {self._options.engine_start_timeout:g} s "
                    f"(--engine-start-timeout):\n{child.last_lines()}"
                )
            try:
                # The socket listens from the start, so this waits in its queue while the model loads.
                _request(child.endpoint.url + "/health", None, min(1.0, left))
            except OSError:
                self._stopped.wait(_POLL)
            else:
                child.watch()
                return

    def _post_all(self, path: str, body: dict[str, Any]) -> None:
        for index, child in enumerate(self._children):
            try:
                _request(child.endpoint.url + path, body, _REQUEST_TIMEOUT)
            except OSError as error:
                raise ServiceError(f"engine {index} at {child.endpoint.url} failed {path}: {error}") from error


def _cannot_listen(index: int, options: LocalEngineOptions, port: int, error: OSError) -> str:
    reason = error.strerror or error
    if options.rollout_engine_base_port is None or error.errno not in (errno.EADDRINUSE, errno.EACCES):
        advice = f"--engine-host {options.engine_host} is not an address of this machine, or it has no port left"
    else:
        advice = (
            f"--rollout-engine-base-port {options.rollout_engine_base_port} gives it this port, which is taken or not "
            "allowed; choose another, or leave it out: then free ones are taken"
        )
    return f"engine {index} cannot listen on {options.engine_host}:{port} ({reason}): {advice}"


def _request(url: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    # Whatever http_proxy says: a proxy elsewhere knows no loopback address of ours.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=timeout) as reply:
            return json.loads(reply.read())
    except HTTPException as error:
        raise ConnectionError(f"the engine broke off its answer: {error!r}") from error


def _with_version(child: Child) -> Endpoint:
    endpoint = child.endpoint
    version = ""
    if child.process.poll() is None:
        with contextlib.suppress(OSError):
            version = _request(endpoint.url + "/model_info", None, _REQUEST_TIMEOUT)["weight_version"]
    # SGLang's name for weights that were never synchronised.
    return Endpoint(url=endpoint.url, node=endpoint.node, weight_version="" if version == "default" else version)
