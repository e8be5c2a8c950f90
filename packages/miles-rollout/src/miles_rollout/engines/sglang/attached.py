"""Engines that somebody else runs: used, watched, and never ended."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from tokenizers import Tokenizer

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_rollout.engines.asking import REQUEST_TIMEOUT, model_info, request, with_version
from miles_rollout.engines.health import HealthWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_api.services import Placement

__all__ = ["AttachedFleet"]

_PROBE = "The 3 quick brown foxes jumped over 12 lazy dogs; naïve café, 北京. 0123456789 > abc"
"""Text by which two tokenizers are told apart."""


class AttachedFleet:
    """An `EngineFleet` of servers at given addresses, which speak SGLang's protocol.

    They must serve the model of the run, at least its tokenizer: their weights are pushed and verified anyway. One that
    is lost stays lost.
    """

    def __init__(self, urls: Sequence[str], model_path: str, *, health_timeout: float, key: str = "") -> None:
        """Take the addresses, `http://host:port`, and the key of all of them; nobody is asked yet."""
        self._urls, self._model_path, self._health_timeout = tuple(urls), model_path, health_timeout
        self._key = key
        self._watches: list[HealthWatch] = []
        self._claims = contextlib.ExitStack()
        self._stopped = threading.Event()

    def start(self, placements: list[Placement]) -> None:
        """Ask each server for its model, and let it go on should an earlier run have left it paused.

        Raises:
            ServiceError: there are not as many placements as servers, one does not answer, serves another model or
                is another run's of this machine, or `stop` was called before.
        """
        if len(placements) != len(self._urls):
            raise ServiceError(
                f"--rollout-engine-urls names {len(self._urls)} engines, and {len(placements)} are wanted"
            )
        if self._stopped.is_set():
            raise ServiceError("the engines were stopped")
        with contextlib.ExitStack() as claims:
            for url in self._urls:
                self._check(url)
                claims.enter_context(_claimed(url))
                self._ask(url, "/continue_generation", {})
            self._claims = claims.pop_all()
        self._watches = [HealthWatch(url, self._health_timeout, self._say(url), key=self._key) for url in self._urls]

    def endpoints(self) -> list[Endpoint]:
        """Return every server's address with the weight version it reports; one that does not answer reports none."""
        return [with_version(Endpoint(url=url, key=self._key)) for url in self._urls]

    def pause(self) -> None:
        """Stop every server between two tokens; requests keep their place and their keys and values."""
        for url in self._urls:
            self._ask(url, "/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Let every server go on."""
        for url in self._urls:
            self._ask(url, "/continue_generation", {})

    def dead(self) -> dict[int, str]:
        """Return, for each server that does not react any more, since when; by index. Does not ask them."""
        lost = {index: watch.problem for index, watch in enumerate(self._watches)}
        return {index: f"engine {index} at {self._urls[index]} {text}" for index, text in lost.items() if text}

    def restart(self, index: int) -> Endpoint:
        """Refuse: whoever runs the server has to. Raises `ServiceError`."""
        raise ServiceError(
            f"engine {index} at {self._urls[index]} was attached (--rollout-engine-urls) and is not ours to restart: "
            "start it again where it runs, then continue this run with --resume"
        )

    def stop(self) -> None:
        """Leave the servers as they are; may be called twice."""
        self._stopped.set()
        for watch in self._watches:
            watch.stop()
        self._claims.close()

    def _say(self, url: str) -> Any:
        return lambda text: print(f"the engine at {url} {text}", file=sys.stderr, flush=True)

    def _check(self, url: str) -> None:
        try:
            info = model_info(url, self._key)
        except OSError as error:
            self._refuse(url, "/model_info", error)
        named = {info.model_path, info.tokenizer_path}
        # A weight update changes the model's path, never the tokenizer's.
        if any(_same(path, self._model_path) for path in named):
            return
        shown, file = " and ".join(sorted(named)), Path(self._model_path, "tokenizer.json")
        theirs = self._tokens(url, shown)
        if not file.is_file() or theirs != Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids:
            raise ServiceError(
                f"the engine at {url} serves {shown}, with other tokens than --hf-checkpoint {self._model_path}: start "
                "it with that model, or name its model as --hf-checkpoint"
            )

    def _tokens(self, url: str, shown: str) -> list[int]:
        answer = self._ask(url, "/tokenize", {"prompt": _PROBE, "add_special_tokens": False}, required=False)
        tokens = answer.get("tokens")
        if not isinstance(tokens, list):
            raise ServiceError(
                f"the engine at {url} serves {shown}, not --hf-checkpoint {self._model_path}, and has no /tokenize to "
                "compare their tokens: start it with that path"
            )
        return tokens

    def _ask(self, url: str, path: str, body: dict[str, Any] | None, *, required: bool = True) -> dict[str, Any]:
        try:
            return request(url + path, body, REQUEST_TIMEOUT, self._key)
        except OSError as error:
            if not required and isinstance(error, urllib.error.HTTPError) and error.code in (404, 405, 501):
                return {}
            self._refuse(url, path, error)

    def _refuse(self, url: str, path: str, error: OSError) -> NoReturn:
        if isinstance(error, urllib.error.HTTPError):
            why = self._why_not_let_in() if error.code in (401, 403) else ""
            raise ServiceError(f"the engine at {url} refused {path} with {error.code}{why}") from error
        raise ServiceError(
            f"the engine at {url} (--rollout-engine-urls) does not answer {path}: {error}; is it running?"
        ) from error

    def _why_not_let_in(self) -> str:
        if not self._key:
            return ": it asks for a key; put that into an environment variable, and its name into --engine-key-variable"
        return (
            ": it does not take the key in the environment variable that --engine-key-variable names. Start it with "
            "that one as --api-key, and with none or the same as --admin-api-key"
        )


def _claimed(url: str) -> contextlib.closing[socket.socket]:
    """Take the server at `url` for this process, as long as it lives or until this is closed.

    Two runs would push their weights to it in turn, under versions that both count from 0, and neither would notice.
    Seen are the runs of this machine: a name that no file stands for belongs to whoever binds it first.
    Raises `ServiceError` where that is another.
    """
    claim = socket.socket(socket.AF_UNIX)
    parts = urlsplit(url)
    try:
        if sys.platform == "linux":  # elsewhere such names are not to be had
            address, port = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0][4][:2]
            claim.bind(f"\0miles-engine [{address}]:{port}")
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise ServiceError(f"{url} (--rollout-engine-urls) cannot be taken for this run: {error}") from error
        raise ServiceError(
            f"the engine at {url} (--rollout-engine-urls) is used by another run of this machine: they would overwrite "
            "each other's weights; give each run servers of its own"
        ) from error
    return contextlib.closing(claim)


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
