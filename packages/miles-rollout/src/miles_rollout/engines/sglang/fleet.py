"""Starts, pauses and replaces SGLang servers, one process group each; they die with the process that started them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING
from zlib import crc32

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_rollout.engines.addresses import bound_socket, url_of
from miles_rollout.engines.child import Child
from miles_rollout.engines.key import key_for
from miles_rollout.engines.processes import ProcessFleet
from miles_rollout.engines.sglang.arguments import ask_arguments, cpu_environment, find_sglang
from miles_rollout.engines.sglang.options import interpreter

if TYPE_CHECKING:
    from miles_api.services import Placement
    from miles_rollout.engines.sglang.options import SGLangOptions
    from miles_rollout.options import EngineFleetOptions

__all__ = ["SGLangFleet"]

# SGLang looks every 5 s whether it was told to end.
_GRACE = 10.0
_LAST_GRACE = 5.0
_SEEDS = 2**31 - 1
_KEY_FILE = "key.yaml"
_ALWAYS = ["--log-level", "warning"]
_ON_CPU = ["--dtype", "float32", "--mem-fraction-static", "0.1", "--max-total-tokens", "32768"]
_ON_CPU += ["--max-running-requests", "64"]
"""Defaults; what a run passes on comes after them and wins."""
# Without it an idle scheduler spins, and takes a core from whoever else computes.
_SLEEP = "sleep_on_idle"


class SGLangFleet(ProcessFleet):
    """SGLang servers on this machine, each on the GPUs of its placement, or on the CPU.

    SGLang has no way to start without serving. One that replaces another reports the weight version `default`, and
    whoever admits engines has to go by that: the supervisor registers it when it has proved the current weights, and
    the router sends requests only to engines that show the required ones.
    """

    _health_patience = 30.0  # SGLang generates a token for it, and takes a second at least

    def __init__(
        self,
        options: SGLangOptions,
        addresses: EngineFleetOptions,
        model_path: str,
        seed: int,
        *,
        gpus_per_engine: int = 1,
        memory_saver: bool = False,
        health_timeout: float = 0.0,
    ) -> None:
        """Take the options; nothing starts yet. `memory_saver` lets engines give up their GPU memory between rollouts.

        Raises `ConfigError` for a key that is not there, or that is none.
        """
        self._key = key_for(addresses)
        super().__init__(addresses.engine_start_timeout, health_timeout)
        self._options, self._addresses, self._model_path, self._seed = options, addresses, model_path, seed
        self._gpus_per_engine, self._memory_saver = gpus_per_engine, memory_saver
        self._extra: list[str] = []

    def start(self, placements: list[Placement]) -> None:
        """Start one server for each placement and wait until all answer.

        Raises:
            ServiceError: SGLang is missing or refuses an argument, a server died (with the end of its output) or took
                too long, or `stop` was called before or meanwhile.
        """
        verdict = ask_arguments(find_sglang(interpreter(self._options)), self._options.sglang_args)
        if verdict.problems:
            raise ServiceError("\n".join(f"[sglang] {name}: {text}" for name, text in verdict.problems.items()))
        self._extra = verdict.words
        super().start(placements)

    def _spawn(self, index: int, *, again: bool) -> Child:
        placement = self._placements[index]
        sock, given = bound_socket(index, self._addresses), self._key_file() if self._key else ()
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(os.getpid()), str(_GRACE)]
        # A file, not a pipe: nobody has to read it while the engine runs.
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the engine has ended
        process = subprocess.Popen(
            [
                *guard,
                interpreter(self._options),
                "-m",
                "sglang.launch_server",
                *self._words(index, *sock.getsockname()),
                *(["--config", str(Path(given[0].name, _KEY_FILE))] if given else []),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=self._environment(index),
            # Ctrl-C is for the driver, which then stops its engines; they are not to die on their own first
            start_new_session=True,
        )
        tp_ranks = tuple(range(self._gpus_per_engine))
        where = {"url": url_of(sock, placement.node), "node": placement.node}
        endpoint = Endpoint(**where, gpu_ids=placement.gpu_ids, tp_ranks=tp_ranks, key=self._key)
        grace = _GRACE + _LAST_GRACE  # the guard needs a moment after its own
        serves = placement.node_rank == 0
        return Child(index, process, endpoint, output, serves=serves, until_it_answers=(sock, *given), grace=grace)

    def _key_file(self) -> tuple[tempfile.TemporaryDirectory[str], IO[bytes]]:
        """Return a folder with what SGLang reads arguments from, here the key, and the memory in which it stands.

        SGLang takes it from there or from its command line, which all users of the machine see. Memory of this process,
        as no disk is to keep a key when this process is killed.
        """
        held = os.fdopen(os.memfd_create(_KEY_FILE), "wb", buffering=0)
        # Quoted as JSON, which is YAML too: it would take 123 for a number.
        held.write(json.dumps({"api-key": self._key}).encode())
        folder = tempfile.TemporaryDirectory(prefix="miles-engine-")
        Path(folder.name, _KEY_FILE).symlink_to(f"/proc/{os.getpid()}/fd/{held.fileno()}")
        return folder, held

    def _words(self, index: int, host: str, port: int, *_: int) -> list[str]:
        """Return the arguments of one server; those of the run come last, as SGLang takes the last."""
        placement = self._placements[index]
        # On a cluster each engine has a fleet, and a process, of its own.
        place = crc32(f"{placement.node} {os.getpid()}".encode()) if placement.node else 0
        # another one after a restart: requests without a seed must not be answered with the same draws again
        seed = (self._seed * 1009 + place + index + 1_000_003 * self._replaced) % _SEEDS
        words = ["--model-path", self._model_path, "--host", host, "--port", str(port)]
        words += ["--tp-size", str(self._gpus_per_engine), "--random-seed", str(seed), *_ALWAYS]
        if placement.num_nodes > 1:
            words += ["--nnodes", str(placement.num_nodes), "--node-rank", str(placement.node_rank)]
            words += ["--dist-init-addr", placement.dist_init_addr]
        if not placement.gpu_ids:
            words += ["--device", "cpu", *_ON_CPU]
            given = {name.replace("-", "_") for name in self._options.sglang_args}
            # A switch, which no other one takes back.
            words += [] if _SLEEP in given else [f"--{_SLEEP.replace('_', '-')}"]
        elif self._memory_saver:
            words.append("--enable-memory-saver")
        return [*words, *self._extra]

    def _environment(self, index: int) -> dict[str, str]:
        placement = self._placements[index]
        if placement.gpu_ids:
            return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, placement.gpu_ids))}
        # Cores by rank: else SGLang wants a NUMA node for each.
        ranks = range(index * self._gpus_per_engine, (index + 1) * self._gpus_per_engine)
        cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in ranks)
        own = {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive", "SGLANG_CPU_OMP_THREADS_BIND": cores}
        return {**own, **os.environ, **cpu_environment()}
