"""This rank's place in the trainer, as hooks see it."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Group", "Parallel"]


class Group(msgspec.Struct, frozen=True):
    """One dimension of parallelism."""

    size: int = 1
    rank: int = 0
    group: Any = None
    """The `torch.distributed` process group of this rank's peers; None outside a started trainer."""


class Parallel(msgspec.Struct, frozen=True):
    """Given to the `loss` hook as `parallel` and to `importance_weights` as `parallel_state`: `parallel.tp.size`."""

    tp: Group = Group()
    pp: Group = Group()
    cp: Group = Group()
    dp: Group = Group()
