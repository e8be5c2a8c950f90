"""From `--update-weight-transfer-mode` and what runs to the synchronisation that a run uses."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.run_options import RunOptions
from miles_train.megatron.hf_config import read_hf_config
from miles_train.options import ClusterOptions, WeightSyncOptions
from miles_train.weight_sync.disk import DiskWay, make_folder
from miles_train.weight_sync.fixed import FixedWeights
from miles_train.weight_sync.frame import Source, WeightSync
from miles_train.weight_sync.plan import Plan, Sent
from miles_train.weight_sync.sent import SentWay
from miles_train.weight_sync.verify import probe_tokens

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_api.services import Endpoint
    from miles_train.driver.remote import Remote

__all__ = ["weight_sync"]


def weight_sync(
    config: RunConfig, trainers: Remote | None, endpoints: list[Endpoint], *, gpus: bool
) -> WeightSync | FixedWeights:
    """Return how the trainer's weights get to the engines; `gpus` says whether the trainer has any."""
    if trainers is None:
        return FixedWeights(endpoints)
    run, cluster, options = config.group(RunOptions), config.group(ClusterOptions), config.group(WeightSyncOptions)
    shared = Path(run.run_dir) if cluster.ray_address else None
    size = sum(file.stat().st_size for file in Path(str(run.hf_checkpoint)).glob("*.safetensors"))
    folder = make_folder(size, shared, fallback=Path(run.run_dir))
    how = options.update_weight_transfer_mode
    if how == "auto":
        how = ("tensor" if cluster.colocate else "broadcast") if gpus else "disk"
    source = _source(trainers, read_hf_config(str(run.hf_checkpoint)).vocab_size)
    mode = options.pause_generation_mode
    way = DiskWay(source, folder, mode) if how == "disk" else SentWay(how, source, folder, options)
    return WeightSync(way, source, endpoints, options, patience=cluster.trainer_timeout)


def _source(trainers: Remote, vocab_size: int) -> Source:
    def send(plan: Plan) -> Sent:
        sent = Sent()
        for rank in trainers.call("send_weights", plan):
            sent.add(rank)
        return sent

    return Source(
        # Each pipeline stage writes and hashes its own tensors.
        export=lambda target, hashed: dict(ChainMap(*trainers.call("export", target, True, hashed))),
        # The last pipeline stage alone sees logits.
        score=lambda tokens: next(filter(None, trainers.call("score", tokens))),
        tokens=probe_tokens(vocab_size),
        send=send,
        snapshot=lambda target, version: all(trainers.call("snapshot", target, version)),
    )
