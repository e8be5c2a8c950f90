"""The ways past the disk, as far as one process shows them: what they allocate, and where they listen."""

from __future__ import annotations

import shutil

import psutil
import pytest
import torch

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_train.weight_sync.broadcast import _store_at
from miles_train.weight_sync.link import Bucket
from miles_train.weight_sync.tensor import TensorLink


def test_a_buffer_that_does_not_fit_into_shared_memory_is_refused_before_it_is_written(monkeypatch):
    usage = shutil.disk_usage("/dev/shm")._replace(total=64 << 20, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    link, tensor = TensorLink(), torch.zeros(2 << 20, dtype=torch.uint8)
    link.open([Endpoint(url="http://127.0.0.1:9")])
    with pytest.raises(ServiceError, match=r"has 1,048,576 bytes left.*2,097,152.*--update-weight-buffer-size"):
        link.put(Bucket([("w", tensor)], tensor.nbytes), {})
    link.close()


def test_an_engine_that_knows_of_no_session_any_more_counts_as_dead(new_engine):
    engine, tensor = new_engine(), torch.zeros(4)
    problem = "the update must run between begin_weight_update() and end_weight_update()"
    engine.replies = {"/update_weights_from_tensor": (400, {"success": False, "message": problem})}
    link, url = TensorLink(), engine.endpoint.url
    link.open([Endpoint(url=url)])
    link.put(Bucket([("w", tensor)], tensor.nbytes), {})
    link.wait()
    link.close()
    assert (list(link.gone), link.refused) == ([url], {})


def test_the_store_of_a_group_listens_at_one_address():
    store = _store_at("127.0.0.1", 2)
    at = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert [address.ip for address in at if address.port == store.port] == ["127.0.0.1"]
