import os
import signal
import sys

import pytest
import ray

from miles_train.driver import cluster


def test_a_sigterm_that_comes_while_ray_has_it_still_reaches_the_run(monkeypatch):
    came = []

    def own(signum, frame):
        came.append(signum)

    def init(**options):
        # As Ray does at the end of its start.
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the handler ends the process")

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, own)
    try:
        cluster._init_ray(address="local")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


@pytest.mark.parametrize(("cpus", "gpus", "world"), [(2, 0, 2), (9, 1, 2)])
def test_a_cluster_that_is_too_small_is_refused_with_both_numbers(monkeypatch, cpus, gpus, world):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
    with pytest.raises(cluster.ServiceError, match=rf"has {cpus} CPUs and {gpus} GPUs; {world} trainer ranks"):
        cluster._gpus_for(world)
