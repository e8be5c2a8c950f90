from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import aiohttp
import httpx
import pytest

from miles_api.errors import ServiceError
from miles_api.services import EngineFleet, Placement
from miles_rollout.engines.asking import request
from miles_rollout.engines.local.__main__ import main as serve_engine
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.options import EngineFleetOptions


@pytest.fixture(scope="module")
def fleet(kit):
    options = LocalEngineOptions(engine_max_running_requests=8, engine_impl="lean")
    fleet = LocalFleet(options, str(kit.directory("qwen3")), seed=0)
    fleet.start([Placement(node="here")])
    yield fleet
    fleet.stop()


@pytest.fixture
def server(fleet, kit):
    """A client of one real engine, put back to the first weights."""
    with httpx.Client(base_url=fleet.endpoints()[0].url, timeout=30) as client:
        yield client
        client.post("/continue_generation")
        client.post("/abort_request", json={"abort_all": True})
        update = {"model_path": str(kit.directory("qwen3")), "weight_version": "default"}
        assert client.post("/update_weights_from_disk", json=update).status_code == 200


LONG = {"temperature": 1.0, "max_new_tokens": 100, "ignore_eos": True, "sampling_seed": 1}


def generate(server, **body):
    reply = server.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_reply_has_sglangs_shape(server):
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    reply = generate(server, input_ids=[5, 6, 7], sampling_params=sampling, return_logprob=True, rid="mine")
    meta = reply["meta_info"]
    assert set(reply) == {"text", "output_ids", "meta_info"}
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", 3, 4)
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert [[i, text] for _, i, text in meta["output_token_logprobs"]] == [[i, None] for i in reply["output_ids"]]
    assert meta["input_token_logprobs"] == []
    assert meta["weight_version"] == "default"
    assert meta["e2e_latency"] > 0
    both = generate(server, input_ids=[5, 6, 7], sampling_params=sampling, return_logprob=True, logprob_start_len=0)
    assert [i for _, i, _ in both["meta_info"]["input_token_logprobs"]] == [5, 6, 7]
    plain = generate(server, input_ids=[5, 6, 7], sampling_params=sampling)
    assert "output_token_logprobs" not in plain["meta_info"]


def test_lists_of_prompts_and_several_samples_come_back_as_lists(server):
    sampling = {"max_new_tokens": 3, "n": 2, "ignore_eos": True}
    replies = generate(server, text=["ab", "c"], sampling_params=sampling)
    assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [2, 2, 1, 1]
    assert len(generate(server, text="ab", sampling_params=sampling)) == 2


def test_a_stream_ends_with_the_whole_reply(server):
    sampling = LONG | {"max_new_tokens": 6}
    whole = generate(server, text="abc", sampling_params=sampling, return_logprob=True)
    lines = server.post("/generate", json={"text": "abc", "sampling_params": sampling, "stream": True}).text.split(
        "\n\n"
    )
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    for event in events[:-1]:
        assert event["meta_info"]["finish_reason"] is None
        assert event["output_ids"] == whole["output_ids"][: len(event["output_ids"])]
        assert whole["text"].startswith(event["text"])


def test_bad_requests_are_answered_with_400_and_a_reason(server):
    for body, message in (
        (b"{", "truncated"),
        (b'{"input_ids": [3], "sampling_params": {"regex": "a"}}', "regex"),
        (b'{"input_ids": [%s]}' % b",".join([b"3"] * 128), "128 tokens"),
    ):
        reply = server.post("/generate", content=body)
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]
    assert server.get("/nowhere").status_code == 404
    assert server.get("/abort_request").status_code == 405
    for path, body in (
        ("/pause_generation", {"mode": "sideways"}),
        ("/abort_request", {}),
        ("/update_weights_from_disk", {}),
    ):
        reply = server.post(path, json=body)
        assert (reply.status_code, reply.json()["success"]) == (400, False)


def test_the_engine_describes_itself(server, kit):
    info = server.get("/server_info").json()
    assert (info["impl"], info["max_running_requests"], info["max_total_len"]) == ("lean", 8, 128)
    assert server.get("/model_info").json()["model_path"] == str(kit.directory("qwen3"))
    assert server.get("/v1/models").json()["data"][0]["max_model_len"] == 128
    assert server.get("/health").status_code == 200
    assert server.post("/begin_weight_update", json={}).json()["success"]
    assert server.post("/end_weight_update", json={}).json()["success"]
    assert server.post("/weights_checker", json={"action": "checksum"}).json()["checksums"]


def test_pause_update_abort_and_flush_work_around_waiting_requests(server, kit):
    async def scenario():
        async with aiohttp.ClientSession(str(server.base_url)) as client:

            async def post(path, **body):
                async with client.post(path, json=body) as reply:
                    return reply.status, await reply.json()

            def start(rid):
                return asyncio.ensure_future(post("/generate", rid=rid, input_ids=[5], sampling_params=LONG))

            assert (await post("/pause_generation", mode="in_place"))[0] == 200
            jobs = {rid: start(rid) for rid in ("kept", "dropped")}
            while (await (await client.get("/server_info")).json())["num_waiting_reqs"] < 2:
                await asyncio.sleep(0.01)
            status, body = await post("/flush_cache")
            assert (status, body["success"]) == (400, False)
            assert (await client.get("/health")).status == 200
            await post("/abort_request", rid="dropped")
            _, dropped = await jobs["dropped"]
            update = {"model_path": str(kit.directory("qwen3", seed=1)), "weight_version": "5"}
            assert (await post("/update_weights_from_disk", **update))[1]["success"]
            assert not jobs["kept"].done()
            await post("/continue_generation")
            _, kept = await jobs["kept"]
            assert (await post("/flush_cache"))[0] == 200
            return dropped, kept

    dropped, kept = asyncio.run(scenario())
    assert dropped["meta_info"]["finish_reason"]["type"] == "abort"
    assert dropped["output_ids"] == []
    assert kept["meta_info"]["weight_version"] == "5"
    assert kept["meta_info"]["weight_versions"] == [{"version": "5", "start": 0, "end": 100}]


def test_a_directory_read_within_a_session_serves_from_its_end_on(server, kit):
    sampling = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}

    def answer():
        reply = generate(server, input_ids=[5, 6, 7], sampling_params=sampling)
        return reply["output_ids"], reply["meta_info"]["weight_version"]

    before = answer()
    assert server.get("/server_info").json()["stages_weights"] is True
    assert server.post("/begin_weight_update", json={}).json()["success"]
    update = {"model_path": str(kit.directory("qwen3", seed=1)), "weight_version": "5"}
    assert server.post("/update_weights_from_disk", json=update).json()["success"]
    assert answer() == before
    assert server.post("/end_weight_update", json={}).json()["success"]
    tokens, version = answer()
    assert version == "5"
    assert tokens != before[0]
    checked = server.post("/weights_checker", json={"action": "checksum"}).json()
    assert checked["stale"] == []


def test_a_bad_update_is_refused_and_changes_nothing(server, kit, tmp_path):
    before = server.post("/weights_checker", json={"action": "checksum"}).json()
    for path in (tmp_path, tmp_path / "none", kit.directory("llama")):
        reply = server.post("/update_weights_from_disk", json={"model_path": str(path), "weight_version": "9"})
        assert (reply.status_code, reply.json()["success"]) == (400, False)
        assert reply.json()["message"]
    assert server.post("/weights_checker", json={"action": "checksum"}).json() == before
    assert server.get("/model_info").json()["weight_version"] == "default"
    renamed = {"new_version": "3", "abort_all_requests": False}
    assert server.post("/update_weight_version", json=renamed).json()["new_version"] == "3"
    assert server.get("/model_info").json()["weight_version"] == "3"


def test_a_client_that_leaves_frees_its_row(server):
    server.post("/pause_generation", json={"mode": "in_place"})
    with pytest.raises(httpx.ReadTimeout):
        server.post("/generate", json={"input_ids": [5], "sampling_params": LONG}, timeout=0.3)
    deadline = time.monotonic() + 10
    while server.get("/server_info").json()["num_total_reqs"]:
        assert time.monotonic() < deadline, "the request is still there"
        time.sleep(0.05)


def test_the_fleet_pauses_resumes_and_replaces_an_engine_that_died(fleet, server, kit):
    assert isinstance(fleet, EngineFleet)
    fleet.pause()
    assert server.get("/server_info").json()["paused"]
    fleet.resume()
    assert not server.get("/server_info").json()["paused"]
    os.kill(server.get("/server_info").json()["pid"], signal.SIGKILL)
    fresh = fleet.restart(0)
    assert fleet.endpoints() == [fresh]
    assert fresh.node == "here"
    assert httpx.get(fresh.url + "/server_info").json()["paused"]
    update = {"model_path": str(kit.directory("qwen3", seed=1)), "weight_version": "4"}
    assert httpx.post(fresh.url + "/update_weights_from_disk", json=update, timeout=30).status_code == 200
    assert not httpx.get(fresh.url + "/server_info").json()["paused"]
    assert fleet.endpoints()[0].weight_version == "4"
    # The fixture's client talks to the dead engine's port; later users get the new one.
    server.base_url = fresh.url


def test_the_fleet_reaches_its_engines_past_a_proxy(fleet, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    # What urllib has found out about proxies it keeps here.
    monkeypatch.setattr("urllib.request._opener", None)
    fleet.pause()
    fleet.resume()


def test_an_engine_that_breaks_off_its_answer_has_failed_like_one_that_gives_none():
    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with pytest.raises(OSError, match="broke off"):
            request(f"http://127.0.0.1:{listener.getsockname()[1]}/health", None, 10.0)


def test_an_engine_that_cannot_start_shows_its_own_words(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ServiceError, match=r"(?s)engine 0 ended with status 2.*tokenizer.json is missing"):
        LocalFleet(LocalEngineOptions(), str(tmp_path), seed=0).start([Placement()])
    with pytest.raises(ServiceError, match="cannot be placed on GPUs"):
        LocalFleet(LocalEngineOptions(), str(tmp_path), seed=0).start([Placement(gpu_ids=(0,))])


def test_a_port_in_use_is_said_so_before_the_model_loads(kit):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "miles_rollout.engines.local", "--model-path", str(kit.directory("qwen3"))]
        done = subprocess.run([*command, "--port", str(port)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_a_port_that_an_engine_cannot_have_names_the_flag_the_port_and_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fleet = LocalFleet(
            LocalEngineOptions(), "model", seed=0, addresses=EngineFleetOptions(rollout_engine_base_port=port - 1)
        )
        with pytest.raises(ServiceError) as caught:
            fleet._listen(1)
    assert f"engine 1 cannot listen on 127.0.0.1:{port} (Address already in use)" in str(caught.value)
    assert f"--rollout-engine-base-port {port - 1} gives it this port" in str(caught.value)
    assert "leave it out" in str(caught.value)
    with pytest.raises(ServiceError, match="--rollout-engine-base-port leaves no port for engine 1: 65536"):
        LocalFleet(
            LocalEngineOptions(), "model", seed=0, addresses=EngineFleetOptions(rollout_engine_base_port=65535)
        )._listen(1)


@pytest.mark.parametrize("inherited", [False, True])
def test_an_engine_without_a_key_refuses_a_socket_that_others_could_reach(inherited, capfd):
    with socket.create_server(("0.0.0.0", 0)) as sock:
        how = ["--fd", str(os.dup(sock.fileno()))] if inherited else ["--host", "0.0.0.0", "--port", "0"]
        assert serve_engine(["--model-path", "model", *how]) == 2
    said = capfd.readouterr().err
    assert "--host 0.0.0.0 can be reached from other machines" in said
    assert "MILES_ENGINE_KEY" in said


@pytest.fixture
def stand_in(monkeypatch):
    """Replace engines by a Python script; the list returned fills with their process ids."""
    start_child = subprocess.Popen

    def install(script):
        def popen(command, **kwargs):
            descriptor = command[command.index("--fd") + 1]
            process = start_child([sys.executable, "-S", "-c", script, descriptor], **kwargs)
            pids.append(process.pid)
            return process

        pids = []
        monkeypatch.setattr(subprocess, "Popen", popen)
        return pids

    return install


SILENT = "import time; time.sleep(600)"
HEALTHY = """
import socket, sys
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    connection, _ = server.accept()
    asked = connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\n{}")
    connection.close()
    if b"/continue_generation" in asked:
        sys.stderr.write("first\\nKeyError: 'cache'\\n")
        sys.exit(3)
"""


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("restarted", [False, True])
def test_stop_ends_a_start_that_is_under_way(stand_in, restarted):
    fleet = LocalFleet(LocalEngineOptions(), "model", seed=0)
    if restarted:
        stand_in(HEALTHY)
        fleet.start([Placement(), Placement()])
    pids, raised = stand_in(SILENT), []

    def start():
        begin = partial(fleet.restart, 1) if restarted else partial(fleet.start, [Placement(), Placement()])
        with pytest.raises(ServiceError) as caught:
            begin()
        raised.append(str(caught.value))

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    while not pids:
        time.sleep(0.001)
    fleet.stop()
    thread.join(20)  # the start itself would wait for 300 s
    assert raised == ["the engines were stopped"]
    assert all(map(gone, pids))
    assert fleet.endpoints() == []


def test_stop_is_final_so_that_a_late_start_leaves_no_engine(stand_in):
    pids = stand_in(SILENT)
    fleet = LocalFleet(LocalEngineOptions(), "model", seed=0)
    fleet.stop()
    for call in (lambda: fleet.start([Placement()]), lambda: fleet.restart(0)):
        with pytest.raises(ServiceError, match="were stopped"):
            call()
    assert pids == []


def test_an_engine_that_dies_says_why_and_one_that_is_stopped_or_replaced_says_nothing(stand_in, capfd):
    pids = stand_in(HEALTHY)
    fleet = LocalFleet(LocalEngineOptions(), "model", seed=0)
    fleet.start([Placement()])
    try:
        fleet.restart(0)
        assert fleet.dead() == {}
        fleet.resume()
        shown = ""
        deadline = time.monotonic() + 10
        while "KeyError" not in shown and time.monotonic() < deadline:
            time.sleep(0.01)
            shown += capfd.readouterr().err
        text = f"engine 0 (pid {pids[1]}) died with exit code 3: first"
        assert shown == f"{text}\nKeyError: 'cache'\n"
        assert fleet.dead() == {0: f"{text}\nKeyError: 'cache'"}
        fleet.restart(0)
        assert fleet.dead() == {}
    finally:
        fleet.stop()
    assert fleet.dead() == {}
    assert capfd.readouterr().err == ""


def test_a_port_that_was_taken_since_an_engine_died_is_said_so_and_the_engine_stays_dead(stand_in):
    pids = stand_in(HEALTHY)
    # Below the ports that the kernel gives to connections: none takes it while no engine has it.
    port = 20000 + os.getpid() % 10000
    fleet = LocalFleet(
        LocalEngineOptions(), "model", seed=0, addresses=EngineFleetOptions(rollout_engine_base_port=port)
    )
    fleet.start([Placement()])
    try:
        os.kill(pids[0], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not fleet.dead():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with socket.create_server(("127.0.0.1", port)):
            with pytest.raises(ServiceError, match=f"--rollout-engine-base-port {port} gives it this port"):
                fleet.restart(0)
            assert set(fleet.dead()) == {0}
        assert fleet.restart(0).url == f"http://127.0.0.1:{port}"
        assert fleet.dead() == {}
    finally:
        fleet.stop()


def test_an_engine_dies_with_its_parent(kit, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys\n"
        "from miles_api.services import Placement\n"
        "from miles_rollout.engines.local.fleet import LocalFleet\n"
        "from miles_rollout.engines.local.options import LocalEngineOptions\n"
        "fleet = LocalFleet(LocalEngineOptions(), sys.argv[1], 0)\n"
        "fleet.start([Placement()])\n"
        "print(fleet.endpoints()[0].url, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run(
        [sys.executable, str(script), str(kit.directory("qwen3"))],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    url = parent.stdout.strip()
    assert url.startswith("http://"), parent.stderr
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(url + "/health", timeout=1)
        except httpx.TransportError:
            break
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.1)


def test_texts_become_the_tokens_that_a_prompt_of_them_has_and_come_back(server):
    text = "a b c"
    answer = generate(server, text=text, sampling_params={"max_new_tokens": 1})
    said = server.post("/tokenize", json={"model": "default", "prompt": text, "add_special_tokens": True}).json()
    assert said["count"] == len(said["tokens"]) == answer["meta_info"]["prompt_tokens"]
    both = server.post("/tokenize", json={"prompt": [text, "c"], "add_special_tokens": False}).json()
    assert both["count"] == [len(tokens) for tokens in both["tokens"]]
    texts = server.post("/detokenize", json={"tokens": both["tokens"]}).json()["text"]
    assert [t.replace(" ", "") for t in texts] == ["abc", "c"]
    assert server.post("/detokenize", json={"tokens": both["tokens"][1]}).json() == {"text": texts[1]}


@pytest.mark.parametrize("tokens", [[-1], [10**9], [[1], [10**9]], [1, [2]], ["a"], None])
def test_what_is_no_token_is_refused(server, tokens):
    answer = server.post("/detokenize", json={"tokens": tokens})
    assert (answer.status_code, answer.json()["success"]) == (400, False)
