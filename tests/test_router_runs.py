"""The router's middleware with real engines and a real run: conversations keep their tokens, a run can be replayed."""

import asyncio
import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from uvicorn.server import ServerState

from miles_api.record import read_dump
from miles_api.services import Placement
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.requests import Requests
from miles_router import Router, RouterOptions
from miles_router.app import RouterApp
from miles_router.options import READY_PREFIX
from miles_router.server import _uvicorn_config

TIMEOUT = 280

# The rollout service of a run, alone, with a router that somebody else started.
ROLLOUTS = """
import sys
from miles_api.checks.check import derive
from miles_api.loading.load import provider
from miles_api.parsing.parse import parse_run

url, count, *words = sys.argv[1:]
service = provider("miles.services", "rollout")(derive(parse_run(words)))
service.start(url)
for rollout_id in range(int(count)):
    service.generate(rollout_id, str(rollout_id))
service.stop()
"""


def ask(url, path, **body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        error.msg = error.read().decode()
        raise


def python(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def engines(quickstart_data):
    fleet = LocalFleet(LocalEngineOptions(), str(quickstart_data / "model"), seed=0)
    try:
        fleet.start([Placement()])
        fleet.resume()
        yield fleet.endpoints()
    finally:
        fleet.stop()


@pytest.mark.parametrize(
    ("options", "short"), [({}, True), ({"router_token": "t"}, True), ({"router_max_requests": 9}, False)]
)
def test_a_runs_own_requests_go_the_short_way_unless_there_are_limits(engines, options, short):
    long_ways = []

    class App(RouterApp):
        async def __call__(self, scope, receive, send):
            long_ways.append(scope["path"])
            await super().__call__(scope, receive, send)

    async def main():
        settings = RouterOptions(**options)
        app = App(settings)
        app.registry.add(engines[0].url)
        config = _uvicorn_config(app, settings)
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        requests = Requests(url, {"Authorization": "Bearer t"}, 60, 4)
        sampling = {"max_new_tokens": 3, "temperature": 0}
        for rid in ("short", "x" * 500_000):  # which comes in several pieces
            await requests.post("/generate", {"input_ids": [1, 2, 3], "sampling_params": sampling, "rid": rid})
        await requests.close()
        server.close()
        await app.close()
        return app.metrics.statuses

    assert asyncio.run(main()) == {200: 2}
    assert long_ways == ([] if short else ["/generate"] * 2)


def test_each_turn_of_a_conversation_sent_as_text_goes_on_from_the_tokens_that_were_generated(engines):
    router = Router(RouterOptions(), ["prefix_tokens"])
    sampling = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True}
    try:
        url = router.start()
        (engine,) = engines
        router.register(engine)
        text, tokens, lost = "sort 31> ", [], 0
        for turn in range(4):
            params = {**sampling, "sampling_seed": turn}
            answer = ask(url, "/generate", text=text, session_id="s", sampling_params=params, return_logprob=True)
            sent = answer["meta_info"]["prompt_token_ids"]
            assert sent[: len(tokens)] == tokens
            alone = ask(engine.url, "/generate", input_ids=sent, sampling_params=params, return_logprob=True)
            assert alone["output_ids"] == answer["output_ids"]
            logprobs = [pair[0] for pair in answer["meta_info"]["output_token_logprobs"]]
            assert logprobs == pytest.approx(
                [pair[0] for pair in alone["meta_info"]["output_token_logprobs"]], abs=1e-5
            )
            lost += ask(engine.url, "/tokenize", prompt=text)["tokens"] != sent
            tokens = sent + answer["output_ids"]
            text += answer["text"] + f" {turn}2> "
        assert lost == 3  # what the text alone would have been sent as: the model says tokens that have no text
        (report,) = router.report()
        assert (report["errors"], report["counts"]["begun"], report["counts"]["continued"]) == (0, 1, 3)
    finally:
        router.stop()


def samples_of(dump):
    kept = ("tokens", "response", "response_length", "reward", "rollout_log_probs", "status", "weight_versions")
    rollouts = [record.groups for record in read_dump(dump) if not record.evaluation]
    samples = [[sample for group in groups for sample in group.samples] for groups in rollouts]
    return [{one.index: {name: getattr(one, name) for name in kept} for one in each} for each in samples]


def test_the_rollouts_of_a_recorded_run_come_out_the_same_without_a_model(small_run, tmp_path):
    recording, first, second = (tmp_path / name for name in ("recording", "first.miles", "second.miles"))
    middleware = ["--miles-router-middleware-paths", "recorder", "--recorder-path", recording]
    python("-m", "miles_api.cli", "train", *small_run(num_rollout=2, save_debug_rollout_data=first), *middleware)

    router = subprocess.Popen(
        [sys.executable, "-m", "miles_api.cli", "router", "--port", "0", "--replay", str(recording)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = router.stdout.readline().strip().removeprefix(READY_PREFIX)
        again = small_run(num_rollout=2, save_debug_rollout_data=second, run_dir=tmp_path / "again")
        python("-c", ROLLOUTS, url, 2, *again, *middleware)  # which decides how requests are put together
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(url, "/generate", text="never asked")
    finally:
        router.terminate()
        router.wait()
        router.stdout.close()
    assert len(samples_of(first)) == 2
    assert [len(rollout) for rollout in samples_of(first)] == [16, 16]
    assert samples_of(second) == samples_of(first)
