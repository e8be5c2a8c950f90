"""What an engine says of its model and weights on `/model_info`."""

from __future__ import annotations

import msgspec

__all__ = ["MODEL_INFO_PATHS", "ModelInfo", "model_info"]

MODEL_INFO_PATHS = ("/model_info", "/get_model_info")
"""Where an engine says it; the second is the name before SGLang 0.5.4, for engines that answer the first with 404."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What an engine serves."""

    weight_version: str | int | None = None
    model_path: str | None = None

    @property
    def version(self) -> str:
        """The weight version as text; empty where the engine says none."""
        return "" if self.weight_version is None else str(self.weight_version)


def model_info(body: bytes) -> ModelInfo:
    """Decode an answer of `/model_info`. Raises `msgspec.DecodeError`."""
    return _decoder.decode(body)


_decoder = msgspec.json.Decoder(ModelInfo)
