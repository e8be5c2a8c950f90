"""Where engines of a cluster listen, and what their processes are told: Ray's nodes are named, not started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from miles_api.config import RunConfig
from miles_api.services import Endpoint, Placement
from miles_rollout.options import EngineFleetOptions
from miles_train.driver import engine_hosts
from miles_train.driver.engine_hosts import EngineHost, Part, RayFleet


class Later:
    """A method of an actor: called at once."""

    def __init__(self, method):
        self.remote = method


class Host:
    """An engine host on a node, which keeps what it is told."""

    def __init__(self, node):
        self.told = []
        self.where = Later(lambda: (node, (), 1234))
        self.start = Later(self._start)

    def _start(self, config, placement, environment):
        self.told.append((config.group(EngineFleetOptions).engine_host, placement.node, environment))
        return Endpoint(url=f"http://{placement.node}:1", key="made-up")


@pytest.fixture
def started(monkeypatch):
    """Start an engine on `node` of a cluster of `nodes`, the first of which is the driver's; return what it is told."""

    def start(node, nodes, **options):
        alive = [{"NodeManagerAddress": each, "Alive": True} for each in nodes]
        gone = [{"NodeManagerAddress": "10.0.0.99", "Alive": False}]
        ray = SimpleNamespace(nodes=lambda: alive + gone, wait=lambda refs, **_: (refs, []), get=lambda ref: ref)
        monkeypatch.setattr(engine_hosts, "ray", ray)
        host = Host(node)
        fleet = RayFleet(
            RunConfig.of(EngineFleetOptions(**options)), lambda _: [Part(host, None)], nodes[0], Path("stacks")
        )
        fleet.start([Placement()])
        (told,) = host.told
        return told

    return start


def test_on_a_cluster_of_one_node_engines_keep_to_loopback(started):
    assert started("10.0.0.1", ["10.0.0.1"]) == ("127.0.0.1", "10.0.0.1", {})


@pytest.mark.parametrize("node", ["10.0.0.1", "10.0.0.2"])
def test_on_a_cluster_of_several_each_engine_listens_on_its_nodes_address(started, node):
    # The driver's node too: trainer ranks that send weights may be on the other.
    assert started(node, ["10.0.0.1", "10.0.0.2"])[:2] == (node, node)


def test_an_address_of_the_users_own_is_kept(started):
    assert started("10.0.0.2", ["10.0.0.1", "10.0.0.2"], engine_host="0.0.0.0")[0] == "0.0.0.0"


def test_other_nodes_get_the_users_key_and_no_other_variable(started, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "correct-horse")
    told = started("10.0.0.2", ["10.0.0.1", "10.0.0.2"], engine_key_variable="OUR_KEY")
    assert told[2] == {"OUR_KEY": "correct-horse"}


def test_the_process_that_hosts_an_engine_has_the_key_before_the_fleet_is_made(monkeypatch, tmp_path):
    seen = []

    class Fleet:
        def start(self, placements): ...

        def endpoints(self):
            return []

    def create(_):
        seen.append(engine_hosts.os.environ.get("OUR_KEY"))
        return Fleet()

    monkeypatch.setenv("OUR_KEY", "an older one")
    monkeypatch.setattr(engine_hosts, "provider", lambda *_: create)
    monkeypatch.setattr(engine_hosts.stacks, "register", lambda *_: None)
    EngineHost("engine-host-0", str(tmp_path)).start(RunConfig.of(), Placement(), {"OUR_KEY": "correct-horse"})
    assert seen == ["correct-horse"]
