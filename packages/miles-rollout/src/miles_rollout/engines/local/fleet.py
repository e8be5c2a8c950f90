"""Starts, pauses and replaces local engines, one process each; they die with the process that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_rollout.engines.addresses import bound_socket, url_of
from miles_rollout.engines.child import Child
from miles_rollout.engines.key import KEY_VARIABLE, key_for
from miles_rollout.engines.processes import ProcessFleet
from miles_rollout.options import EngineFleetOptions

if TYPE_CHECKING:
    import socket

    from miles_api.services import Placement
    from miles_rollout.engines.local.options import LocalEngineOptions

__all__ = ["LocalFleet"]

_BACKLOG = 2048


class LocalFleet(ProcessFleet):
    """CPU engines on this machine; one that replaces another keeps requests until it has weights, or is resumed."""

    def __init__(
        self,
        options: LocalEngineOptions,
        model_path: str,
        seed: int,
        *,
        addresses: EngineFleetOptions | None = None,
        deterministic: bool = False,
        health_timeout: float = 0.0,
    ) -> None:
        """Take the options; nothing starts yet. `addresses` are loopback's by default.

        Raises `ConfigError` for a key that is not there, or that is none.
        """
        self._addresses = addresses or EngineFleetOptions()
        self._key = key_for(self._addresses)
        super().__init__(self._addresses.engine_start_timeout, health_timeout)
        self._options, self._model_path, self._seed = options, model_path, seed
        self._deterministic = deterministic

    def start(self, placements: list[Placement]) -> None:
        """Start one engine for each placement and wait until all answer.

        Raises:
            ServiceError: a placement has GPUs, an engine died (with the end of its stderr) or took too long, or
                `stop` was called before or meanwhile.
        """
        if any(placement.gpu_ids for placement in placements):
            raise ServiceError("the local engine runs on CPU threads; it cannot be placed on GPUs")
        super().start(placements)

    def _spawn(self, index: int, *, again: bool) -> Child:
        options = self._options
        sock = self._listen(index)
        command = [sys.executable, "-m", "miles_rollout.engines.local", "--model-path", self._model_path]
        command += ["--fd", str(sock.fileno()), "--impl", options.engine_impl]
        command += ["--max-running-requests", str(options.engine_max_running_requests)]
        # another one after a restart: requests without a seed must not be answered with the same draws again
        seed = self._seed * 1009 + index + 1_000_003 * self._replaced
        command += ["--seed", str(seed), "--parent-pid", str(os.getpid())]
        if again:
            command.append("--await-weights")
        if options.engine_max_total_len is not None:
            command += ["--max-total-len", str(options.engine_max_total_len)]
        if self._deterministic:
            command.append("--deterministic")
        # A file, not a pipe: nobody has to read it while the engine runs.
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the engine has ended
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": "1", KEY_VARIABLE: self._key}
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
            node = self._placements[index].node
            endpoint = Endpoint(url=url_of(sock, node), node=node, key=self._key)
        return Child(index, process, endpoint, errors)

    def _listen(self, index: int) -> socket.socket:
        """Open the engine's socket here, so that no other process can take the port before it listens."""
        sock = bound_socket(index, self._addresses)
        sock.listen(_BACKLOG)
        return sock
