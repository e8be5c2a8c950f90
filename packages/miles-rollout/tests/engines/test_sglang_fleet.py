"""SGLang engines as processes: a stand-in for SGLang is launched, killed, orphaned and replaced for real."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import pytest

from miles_api.errors import ServiceError
from miles_api.parsing.parse import parse_run
from miles_api.services import EngineFleet, Placement
from miles_rollout.engines.asking import request
from miles_rollout.engines.fleet import create
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.sglang import fleet as fleet_module
from miles_rollout.engines.sglang.arguments import find_sglang
from miles_rollout.engines.sglang.attached import AttachedFleet
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions

STAND_IN = str(Path(__file__).with_name("stand_in"))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    """Let this Python have the stand-in as its SGLang."""
    monkeypatch.setenv("PYTHONPATH", STAND_IN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    find_sglang.cache_clear()
    yield
    find_sglang.cache_clear()


@pytest.fixture
def make():
    fleets = []

    def build(health_timeout=0.0, seed=3, args=None, **settings):
        mine = {name: settings.pop(name) for name in list(settings) if name in EngineFleetOptions.__struct_fields__}
        options, addresses = SGLangOptions(sglang_args=args or {}), EngineFleetOptions(**mine)
        fleets.append(SGLangFleet(options, addresses, "the-model", seed, health_timeout=health_timeout, **settings))
        return fleets[-1]

    yield build
    for fleet in fleets:
        fleet.stop()


def about(endpoint):
    return request(endpoint.url + "/server_info", None, 10)


def lives(pid):
    """Say whether a process runs; a zombie that nobody in this container reaps does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(holds, what):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def start_and_be_stopped(fleet):
    with pytest.raises(ServiceError, match="were stopped"):
        fleet.start([Placement()])


def test_every_engine_gets_the_arguments_and_the_environment_of_its_placement(make):
    fleet = make(args={"mem_fraction_static": 0.25, "cuda_graph_bs": [1, 2], "disable_radix_cache": True})
    assert isinstance(fleet, EngineFleet)
    fleet.start([Placement(node="here"), Placement(node="here"), Placement(gpu_ids=(2, 5))])
    first, second, third = fleet.endpoints()
    assert (first.node, first.weight_version, third.gpu_ids) == ("here", "", (2, 5))
    on_cpu, other, on_gpus = map(about, (first, second, third))
    for one in (on_cpu, other, on_gpus):
        assert (one["model_path"], one["host"], one["cuda_graph_bs"]) == ("the-model", "127.0.0.1", [1, 2])
        # What a run passes on comes after our defaults for a CPU, and wins.
        assert (one["mem_fraction_static"], one["disable_radix_cache"]) == (0.25, True)
    assert (on_cpu["device"], on_cpu["dtype"], on_cpu["max_total_tokens"]) == ("cpu", "float32", 32768)
    assert (on_gpus["device"], on_gpus["dtype"], on_gpus["max_total_tokens"]) == (None, "auto", None)
    assert (on_cpu["sleep_on_idle"], on_gpus["sleep_on_idle"]) == (True, False)
    assert len({one["random_seed"] for one in (on_cpu, other, on_gpus)}) == 3
    assert on_cpu["environment"]["SGLANG_USE_CPU_ENGINE"] == "1"
    assert on_cpu["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert on_gpus["environment"]["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert on_gpus["environment"]["SGLANG_USE_CPU_ENGINE"] is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], LocalFleet),
        (["--rollout-engine", "sglang"], SGLangFleet),
        (["--rollout-engine", "sglang", "--rollout-engine-urls", "http://a:1,http://b:2"], AttachedFleet),
    ],
)
def test_the_options_of_a_run_name_its_fleet(words, expected):
    assert type(create(parse_run(["--hf-checkpoint", "the-model", *words]))) is expected


def test_an_engine_over_several_nodes_has_one_address_and_its_parts_know_each_other(make):
    fleet = make(gpus_per_engine=2, memory_saver=True)
    where = {"num_nodes": 2, "dist_init_addr": "10.0.0.1:9999"}
    fleet.start([Placement(gpu_ids=(0,), **where), Placement(gpu_ids=(0,), node_rank=1, **where)])
    (endpoint,) = fleet.endpoints()
    assert endpoint.tp_ranks == (0, 1)
    told = about(endpoint)
    assert (told["tp_size"], told["nnodes"], told["node_rank"]) == (2, 2, 0)
    assert (told["dist_init_addr"], told["enable_memory_saver"]) == ("10.0.0.1:9999", True)
    os.kill(fleet._children[1].process.pid, signal.SIGKILL)
    until(lambda: set(fleet.dead()) == {1}, "a part that nobody can ask is watched too")


def test_pause_and_resume_reach_every_engine(make):
    fleet = make()
    fleet.start([Placement(), Placement()])
    fleet.pause()
    assert [about(endpoint)["paused"] for endpoint in fleet.endpoints()] == [True, True]
    fleet.resume()
    assert [about(endpoint)["paused"] for endpoint in fleet.endpoints()] == [False, False]


def test_an_engine_that_dies_leaves_nothing_behind_and_a_new_one_owns_to_having_no_weights_yet(make, capfd):
    fleet = make()
    fleet.start([Placement()])
    (endpoint,) = fleet.endpoints()
    request(endpoint.url + "/update_weights_from_disk", {"model_path": "/w", "weight_version": "7"}, 10)
    assert fleet.endpoints()[0].weight_version == "7"
    before = about(endpoint)
    with pytest.raises(OSError, match=r"."):
        request(endpoint.url + "/die", {}, 10)
    until(fleet.dead, "its death is seen")
    assert "died with exit code 3: RuntimeError: out of memory" in fleet.dead()[0]
    until(lambda: not any(map(lives, before["pids"])), "its worker dies with it")
    assert fleet.endpoints()[0].weight_version == ""
    new = fleet.restart(0)
    assert fleet.dead() == {}
    after = about(new)
    assert (after["weight_version"], after["model_path"]) == ("default", "the-model")
    assert fleet.endpoints()[0].weight_version == ""
    assert after["random_seed"] != before["random_seed"]
    fleet.stop()
    assert not any(map(lives, after["pids"]))
    assert capfd.readouterr().err.count("died with exit code") == 1


@pytest.mark.parametrize("victim", ["server", "guard"])
def test_a_killed_engine_is_dead_as_a_whole(make, victim):
    fleet = make()
    fleet.start([Placement()])
    pids = about(fleet.endpoints()[0])["pids"]
    guard = fleet._children[0].process.pid
    os.kill(pids[0] if victim == "server" else guard, signal.SIGKILL)
    until(fleet.dead, "its death is seen")
    assert "exit code -9" in fleet.dead()[0]
    # The worker of a real SGLang asks the kernel to be killed with its parent; only the guard's end leaves it to that.
    watched = pids if victim == "server" else pids[:1]
    until(lambda: not any(map(lives, watched)), "nothing of it is left")
    if victim == "guard":
        os.kill(pids[1], signal.SIGKILL)


def test_what_an_engine_leaves_is_buried_even_where_nobody_else_does(make):
    libc, subreaper = ctypes.CDLL(None), 36
    assert libc.prctl(subreaper, 1) == 0  # orphans come to this process, which does as the init of many a container
    try:
        fleet = make()
        fleet.start([Placement()])
        pids = about(fleet.endpoints()[0])["pids"]
        fleet.stop()
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    finally:
        libc.prctl(subreaper, 0)


def test_an_engine_that_lives_and_does_not_react_counts_as_dead_and_is_replaced(make, monkeypatch):
    monkeypatch.setenv("STAND_IN_STUBBORN", "1")
    monkeypatch.setattr(fleet_module, "_GRACE", 0.2)
    fleet = make(health_timeout=0.5)
    fleet.start([Placement()])
    pids = about(fleet.endpoints()[0])["pids"]
    os.kill(pids[0], signal.SIGSTOP)
    until(fleet.dead, "its silence is noticed")
    asked = time.monotonic()
    assert "does not answer /server_info for 0.5 s (--engine-health-timeout)" in fleet.dead()[0]
    assert time.monotonic() - asked < 0.5  # the question is not put to the engine
    new = fleet.restart(0)
    assert not any(map(lives, pids))
    assert fleet.dead() == {}
    assert about(new)["pids"] != pids


def test_engines_die_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os\n"
        "from miles_api.services import Placement\n"
        "from miles_rollout.engines.asking import request\n"
        "from miles_rollout.options import EngineFleetOptions\n"
        "from miles_rollout.engines.sglang.fleet import SGLangFleet\n"
        "from miles_rollout.engines.sglang.options import SGLangOptions\n"
        "fleet = SGLangFleet(SGLangOptions(), EngineFleetOptions(), 'the-model', 1)\n"
        "fleet.start([Placement()])\n"
        "told = request(fleet.endpoints()[0].url + '/server_info', None, 10)\n"
        "print(fleet._children[0].process.pid, *told['pids'], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=60)
    pids = [int(word) for word in parent.stdout.split()]
    assert len(pids) == 3, parent.stderr
    until(lambda: not any(map(lives, pids)), "the engine outlived its parent")


def test_an_engine_that_cannot_start_shows_its_own_words(make, monkeypatch):
    monkeypatch.setenv("STAND_IN_START", "fail")
    with pytest.raises(ServiceError, match=r"(?s)engine 0 ended with status 1 at start:.*has no config\.json"):
        make().start([Placement()])
    monkeypatch.setenv("STAND_IN_START", "hang")
    with pytest.raises(ServiceError, match=r"did not answer within 0\.5 s \(--engine-start-timeout\)"):
        make(engine_start_timeout=0.5).start([Placement()])


def test_stop_ends_a_start_that_is_under_way(make, monkeypatch):
    monkeypatch.setenv("STAND_IN_START", "hang")
    fleet, raised = make(), []

    def start():
        with pytest.raises(ServiceError) as caught:
            fleet.start([Placement(), Placement()])
        raised.append(str(caught.value))

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    until(lambda: len(fleet._children) == 2, "both are launched")
    pids = [child.process.pid for child in fleet._children]
    fleet.stop()
    thread.join(20)
    assert raised == ["the engines were stopped"]
    assert not any(map(lives, pids))
    assert fleet.endpoints() == []


def test_a_port_stays_an_engines_own_while_it_starts(make, monkeypatch):
    monkeypatch.setenv("STAND_IN_START", "hang")
    port = 20000 + os.getpid() % 10000
    fleet = make(rollout_engine_base_port=port)
    thread = threading.Thread(target=start_and_be_stopped, args=(fleet,), daemon=True)
    thread.start()
    until(lambda: fleet._children, "it is launched")
    taken = subprocess.run(
        [sys.executable, "-S", "-c", f"import socket; socket.socket().bind(('127.0.0.1', {port}))"],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "Address already in use" in taken.stderr
    fleet.stop()
    thread.join(20)


def test_what_sglang_does_not_accept_starts_nothing(make):
    fleet = make(args={"dtype": "fp64", "port": 1})
    with pytest.raises(ServiceError, match=r"(?s)dtype: SGLang says: invalid choice.*port: not passed on") as caught:
        fleet.start([Placement()])
    assert "--rollout-engine-base-port" in str(caught.value)
    assert fleet._children == []


def on_a_command_line(text):
    """Say whether any process of this machine shows `text` in its arguments."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_bytes())
    return text.encode() in b"".join(lines)


def test_a_server_that_others_could_reach_asks_for_a_key_that_only_its_endpoint_tells(make, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module.tempfile, "tempdir", str(tmp_path))
    fleet = make(engine_host="0.0.0.0")
    fleet.start([Placement(node="127.0.0.2")])
    (endpoint,) = fleet.endpoints()
    assert endpoint.url.startswith("http://127.0.0.2:")
    assert len(endpoint.key) > 32
    assert request(endpoint.url + "/server_info", None, 10, endpoint.key)["api_key"] == endpoint.key
    with pytest.raises(OSError, match="401"):
        about(endpoint)
    fleet.pause()
    assert not on_a_command_line(endpoint.key)
    assert list(tmp_path.glob("miles-engine-*")) == []
    with pytest.raises(OSError, match=r"."):
        request(endpoint.url + "/die", {}, 10, endpoint.key)
    until(fleet.dead, "its death is seen")
    assert "api_key=(the key)" in fleet.dead()[0]
    assert endpoint.key not in fleet.dead()[0] + repr(endpoint)
    assert fleet.restart(0).key == endpoint.key


def test_a_key_of_the_users_own_is_asked_for_on_loopback_too(make, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "correct-horse")
    fleet = make(engine_key_variable="OUR_KEY")
    fleet.start([Placement()])
    assert fleet.endpoints()[0].key == "correct-horse"
    with pytest.raises(OSError, match="401"):
        about(fleet.endpoints()[0])


def test_a_part_that_answers_nobody_has_the_key_for_as_long_as_it_takes_to_start(make):
    fleet = make(engine_host="0.0.0.0")
    fleet.start([Placement(num_nodes=2, node_rank=1, dist_init_addr="10.0.0.1:9999", node="127.0.0.1")])
    part = fleet._children[0]

    def told():
        assert fleet.dead() == {}
        with contextlib.suppress(ConnectionError, urllib.error.URLError):
            return request(part.endpoint.url + "/server_info", None, 10, part.endpoint.key)["api_key"]

    until(lambda: told() == part.endpoint.key, "it has read the key")


def test_a_driver_that_is_killed_while_a_server_starts_leaves_no_key_behind(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "from miles_api.services import Placement\n"
        "from miles_rollout.options import EngineFleetOptions\n"
        "from miles_rollout.engines.sglang.fleet import SGLangFleet\n"
        "from miles_rollout.engines.sglang.options import SGLangOptions\n"
        "SGLangFleet(SGLangOptions(), EngineFleetOptions(engine_key_variable='OUR_KEY'), 'm', 1).start([Placement()])\n"
    )
    own = {"OUR_KEY": "correct-horse", "TMPDIR": str(tmp_path), "STAND_IN_START": "hang"}
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, **own})
    try:
        until(lambda: list(tmp_path.glob("miles-engine-*/key.yaml")), "the server is started")
        (file,) = tmp_path.glob("miles-engine-*/key.yaml")
        assert "correct-horse" in file.read_text(encoding="utf-8")
    finally:
        parent.kill()
        parent.wait()
    left = [path for path in tmp_path.glob("miles-engine-*/*") if path.is_file()]
    assert [path for path in left if "correct-horse" in path.read_text(encoding="utf-8")] == []


def test_an_idle_server_may_be_told_to_spin(make):
    fleet = make(args={"sleep_on_idle": False})
    fleet.start([Placement()])
    assert about(fleet.endpoints()[0])["sleep_on_idle"] is False
