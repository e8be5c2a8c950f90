"""The key that engines ask for where other machines can reach them: who sends it, as a bearer token, may do anything.

It comes from the environment or is made up, and is handed on in environments and arguments of calls, never on a
command line, which every user of a machine can read.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from typing import TYPE_CHECKING

from miles_api.addresses import is_loopback
from miles_api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miles_rollout.options import EngineFleetOptions

__all__ = ["KEY_VARIABLE", "bears", "given_key", "header_of", "key_for"]

KEY_VARIABLE = "MILES_ENGINE_KEY"
"""Where the process of a local engine finds its key."""
_BYTES = 32
# RFC 6750's b64token: no JSON, YAML or header needs an escape for it. With a dash in front a flag would be read.
_KEY = re.compile(r"(?!-)[A-Za-z0-9\-._~+/]+=*")


def given_key(options: EngineFleetOptions) -> str:
    """Return the key that `--engine-key-variable` names, empty without; raises `ConfigError`, which never shows it."""
    variable = options.engine_key_variable
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"--engine-key-variable {variable}: this environment variable is not set, or empty")
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"--engine-key-variable {variable}: a key is made of letters, digits and -._~+/, with = at its end alone, "
            "and does not begin with a dash; what this variable holds is none"
        )
    return key


def key_for(options: EngineFleetOptions) -> str:
    """Return the key of engines that are started: the given one, or a new one where other machines can reach them.

    It is empty for engines on loopback without a given one. Raises `ConfigError` as `given_key` does.
    """
    return given_key(options) or ("" if is_loopback(options.engine_host) else secrets.token_urlsafe(_BYTES).lstrip("-"))


def header_of(key: str) -> dict[str, str]:
    """Return the header that shows the key; none without."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def bears(headers: Iterable[tuple[bytes, bytes]], key: bytes) -> bool:
    """Tell whether a request brings `Authorization: Bearer <key>`; how long that takes says nothing of the key."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            return scheme.lower() == b"bearer" and hmac.compare_digest(given, key)
    return False
