"""One trainer rank's part in a push that goes past the disk: tensors are gathered and sent bucket by bucket.

Tensor-parallel shards are gathered by all ranks of their group; the first replica's first rank of each pipeline stage
sends what its stage holds, one stage after the other. No rank ever has the whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch.distributed as dist

from miles_api.checksum import checksums
from miles_train.megatron import hf
from miles_train.megatron.core import parallel_state
from miles_train.megatron.cpu import has_gpu
from miles_train.weight_sync.broadcast import BroadcastLink
from miles_train.weight_sync.link import Bucket, Link, in_buckets
from miles_train.weight_sync.plan import Plan, Sent
from miles_train.weight_sync.tensor import TensorLink

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from miles_train.megatron.core import DistributedDataParallel

__all__ = ["Sender"]


class Sender:
    """Keeps buffers and process group of one rank from one push to the next."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}

    def send(self, model: list[DistributedDataParallel], plan: Plan) -> Sent:
        """Send the model's weights as the plan says; every rank calls it. Engines are within an update session.

        Returns what this rank saw. An engine that dies or refuses is in the result, not an exception: other ranks are
        in collectives with this one.
        """
        sends = parallel_state.get_tensor_model_parallel_rank() == 0 and _is_first_replica()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        mine, sent = parallel_state.get_pipeline_model_parallel_rank(), Sent()
        plan = msgspec.structs.replace(plan, bucket_bytes=min(plan.bucket_bytes, _overlapping(model)))
        for stage in range(stages):
            if stage == mine and _is_first_replica():
                named = hf.named_hf_tensors(model)
                sent = self._send_stage(named, plan, sent, last=stage == stages - 1) if sends else _only_gathered(named)
            if stages > 1 and sends:
                sent = _told(sent)
        return sent

    def close(self) -> None:
        """Leave process groups and free the buffers."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _send_stage(self, named: Iterable[tuple[str, Any]], plan: Plan, before: Sent, *, last: bool) -> Sent:
        """Send all tensors of this rank's stage; of the last stage's last bucket the engines get the version."""
        sent = Sent()
        link = self._link(plan.how)
        left = [one for one in plan.receivers if one.url not in before.gone]
        if before.refused or (before.gone and plan.how == "broadcast"):
            left = []
        link.open(left)
        for bucket, is_final in _with_end(in_buckets(named, plan.bucket_bytes)):
            sent.dtype = str(bucket.tensors[0][1].dtype).removeprefix("torch.")
            sent.bytes += bucket.bytes
            if plan.hashed:
                sent.checksums |= checksums({name: tensor.cpu() for name, tensor in bucket.tensors})
            ends = {"weight_version": plan.version, "flush_cache": plan.flush} if last and is_final else _MORE
            link.put(bucket, ends)
        link.wait()
        sent.gone |= link.gone
        sent.refused |= link.refused
        return sent

    def _link(self, how: str) -> Link:
        if how not in self._links:
            self._links[how] = TensorLink() if how == "tensor" else BroadcastLink("nccl" if has_gpu() else "gloo")
        return self._links[how]


_BUCKETS, _LEAST = 8, 16 * 1024**2
"""Into how many buckets a stage is cut at least, unless they would be so small that requests cost more than bytes."""
_MORE = {"flush_cache": False}
"""What goes with a bucket that others follow."""


def _overlapping(model: list[DistributedDataParallel]) -> int:
    """Return of how many bytes buckets have to be for one to be packed while another one is under way."""
    shards = parallel_state.get_tensor_model_parallel_world_size()
    size = shards * sum(parameter.nbytes for part in model for parameter in part.parameters())
    return max(size // _BUCKETS, _LEAST)


def _is_first_replica() -> bool:
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _only_gathered(named: Iterable[tuple[str, Any]]) -> Sent:
    """Take part in the gathering of tensors that another rank sends."""
    for _ in named:
        pass
    return Sent()


def _told(sent: Sent) -> Sent:
    """Tell the other stages who died and who refused; return what this rank knows then."""
    heard: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    known = (sent.gone, sent.refused)
    dist.all_gather_object(heard, known, group=parallel_state.get_pipeline_model_parallel_group())
    for gone, refused in heard:
        sent.gone |= gone
        sent.refused |= refused
    return sent


def _with_end(buckets: Iterator[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    """Say of each bucket whether it is the last one."""
    held: Bucket | None = None
    for bucket in buckets:
        if held is not None:
            yield held, False
        held = bucket
    if held is not None:
        yield held, True
