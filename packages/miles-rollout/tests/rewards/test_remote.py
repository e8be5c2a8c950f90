import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web

from miles_api.errors import ConfigError, SampleError, ServiceError
from miles_api.sample import Sample
from miles_rollout.check import check
from miles_rollout.rewards import grade, remote, reward
from miles_rollout.rewards.remote import close_remote, take_remote_metrics


class RewardServer:
    """A real server in a thread of its own; `answer(request, number)` makes its answers, from the first on."""

    def __init__(self, answer):
        self.answer, self.received, self.times, self.peers = answer, [], [], set()
        self.running = self.most_running = 0
        self.cancelled = threading.Event()
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def _serve(self, ready):
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        self.loop.run_until_complete(self._start())
        ready.set()
        self.loop.run_forever()

    async def _start(self):
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/score"

    async def _handle(self, request):
        self.received.append(await request.json())
        self.times.append(time.monotonic())
        self.peers.add(request.transport.get_extra_info("peername"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self.answer(request, len(self.received))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    def close(self):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


def says(*answers):
    """Answer with each in turn, and with the last one from then on: `(status, text, headers)` or a text alone."""

    async def answer(request, number):
        given = answers[min(number, len(answers)) - 1]
        status, text, headers = given if isinstance(given, tuple) else (200, given, {})
        return web.Response(status=status, text=text, headers=headers)

    return answer


async def stalls(request, number):
    await asyncio.sleep(3600)


@pytest.fixture
def server():
    servers = []

    def start(answer):
        servers.append(RewardServer(answer if callable(answer) else says(*answer)))
        return servers[-1]

    yield start
    for one in servers:
        one.close()


@pytest.fixture
def ask(args_of):
    """Score samples by `remote_rm` at once, in an event loop of their own."""

    def score(url, *samples, **values):
        args = args_of(rm_type="remote_rm", rm_url=url, **{"rm_url_timeout": 20.0, **values})

        async def run():
            try:
                return await asyncio.gather(*(reward(args, sample) for sample in samples or [sample_of()]))
            finally:
                ask.metrics = take_remote_metrics()
                await close_remote()

        return asyncio.run(run())

    ask.metrics = {}
    score.metrics = lambda: ask.metrics
    return score


def sample_of(**fields):
    return Sample(index=7, prompt="1 + 1 =", response=" 2", label="2", **fields)


def test_prompt_response_and_label_are_posted_and_a_number_comes_back(server, ask):
    scorer = server(["0.25"])
    assert ask(scorer.url) == [0.25]
    assert scorer.received == [{"prompt": "1 + 1 =", "response": " 2", "label": "2"}]


def test_chat_messages_and_labels_of_any_kind_are_sent_as_they_are(server, ask):
    scorer = server(["1"])
    messages, label = [{"role": "user", "content": "é"}], {"answers": [1, None, "x"]}
    assert ask(scorer.url, Sample(prompt=messages, response="", label=label)) == [1.0]
    assert scorer.received == [{"prompt": messages, "response": "", "label": label}]


def test_a_sample_that_is_no_json_is_named_and_not_sent(server, ask):
    scorer = server(["1"])
    with pytest.raises(SampleError, match="sample 7 cannot be sent to --rm-url"):
        ask(scorer.url, Sample(index=7, label=object()))
    assert scorer.received == []


def test_an_object_gives_its_reward_or_all_its_numbers_to_a_reward_key(server, ask):
    scorer = server(['{"reward": 0.5, "style": 2, "why": "short", "tokens": [1], "detail": {}}'])
    assert ask(scorer.url) == [0.5]
    assert ask(scorer.url, reward_key="style") == [{"reward": 0.5, "style": 2.0}]
    assert ask(scorer.url, eval_reward_key="style") == [{"reward": 0.5, "style": 2.0}]


@pytest.mark.parametrize(
    "body",
    ["NaN", "1e999", "true", "null", '"0.5"', "[0.5]", "<html>busy</html>", "", "\xff", "[" * 100_000,
     '{"score": 1}', '{"reward": null}', '{"reward": 1, "style": null}', '{"reward": true}', "1" * 400],
)  # fmt: skip
def test_an_answer_that_is_no_finite_number_is_an_error_with_status_and_body_and_is_not_asked_for_again(
    server, ask, body
):
    scorer = server([body])
    with pytest.raises(
        ServiceError, match=r"--rm-url http://127.0.0.1:\d+/score answered 200 without a score"
    ) as caught:
        ask(scorer.url)
    assert body[:300] in str(caught.value)
    assert len(str(caught.value)) < 600
    assert len(scorer.received) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_repeated_and_shows_status_and_the_beginning_of_the_body(server, ask, status):
    scorer = server([(status, "no such model " + "x" * 10_000, {})])
    with pytest.raises(ServiceError, match=f"answered {status}: no such model x+$") as caught:
        ask(scorer.url)
    assert len(str(caught.value)) < 400
    assert len(scorer.received) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_cannot_serve_now_is_asked_again_and_the_retries_are_counted(server, ask, status, capsys):
    scorer = server([(status, "busy", {}), (status, "busy", {}), "0.5"])
    assert ask(scorer.url) == [0.5]
    assert len(scorer.received) == 3
    assert ask.metrics()["rollout/rm_retries"] == 2
    assert ask.metrics()["rollout/rm_seconds"] > 0
    assert capsys.readouterr().out.count("warning: --rm-url") == 1


def test_retry_after_is_waited_for(server, ask):
    scorer = server([(429, "later", {"Retry-After": "1"}), "0.5"])
    assert ask(scorer.url) == [0.5]
    assert scorer.times[1] - scorer.times[0] >= 1.0


@pytest.mark.parametrize("after", ["soon", "\u00b2", "Mon, 01 Jan 2020 00:00:00 +99999999999999", "-3"])
def test_a_retry_after_that_says_nothing_is_ignored(after):
    assert remote._seconds(after) == 0.0


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(server, ask):
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    for after in ("3600", in_an_hour):
        scorer = server([(503, "loading", {"Retry-After": after})])
        with pytest.raises(ServiceError, match=r"no score within --rm-url-timeout 600 s; 1 .*answered 503: loading"):
            ask(scorer.url, rm_url_timeout=600.0)
        assert len(scorer.received) == 1


def test_an_answer_that_breaks_off_is_asked_for_again(server, ask):
    async def answer(request, number):
        if number > 1:
            return web.Response(text="0.75")
        reply = web.StreamResponse(headers={"Content-Length": "100"})
        await reply.prepare(request)
        await reply.write(b"0.")
        request.transport.abort()
        return reply

    scorer = server(answer)
    assert ask(scorer.url) == [0.75]
    assert len(scorer.received) == 2


def test_an_answer_without_end_is_not_read_to_its_end(server, ask):
    async def answer(request, number):
        reply = web.StreamResponse()
        await reply.prepare(request)
        while True:
            await reply.write(b"1" * 65536)

    scorer = server(answer)
    with pytest.raises(ServiceError, match="without a score"):
        ask(scorer.url)


def test_a_redirect_is_not_followed_and_says_where_it_leads(server, ask):
    other = server(["1"])
    scorer = server([(307, "", {"Location": other.url.replace("http://", "http://me:secret@")})])
    with pytest.raises(ServiceError, match=f"answered 307, a redirect to {other.url}, which is not followed"):
        ask(scorer.url)
    assert other.received == []


def test_a_server_that_is_not_there_is_waited_for_until_the_deadline(server, ask):
    scorer = server(["1"])
    scorer.close()
    with pytest.raises(ServiceError, match=r"no score within --rm-url-timeout 0.5 s; \d attempts failed, the last one"):
        ask(scorer.url, rm_url_timeout=0.5)
    scorer.close = lambda: None


def test_a_server_that_stalls_fails_at_the_deadline_and_its_request_ends(server, ask):
    scorer = server(stalls)
    with pytest.raises(ServiceError, match=r"no score within --rm-url-timeout 0\.3 s$"):
        ask(scorer.url, rm_url_timeout=0.3)
    assert scorer.cancelled.wait(10)


def test_an_aborted_rollout_leaves_no_request_running(server, args_of):
    scorer = server(stalls)
    args = args_of(rm_type="remote_rm", rm_url=scorer.url, rm_concurrency=1)

    async def run():
        tasks = [asyncio.ensure_future(reward(args, sample_of())) for _ in range(3)]
        while not scorer.running:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        await asyncio.to_thread(scorer.cancelled.wait, 10)
        # The slot is free again, and the next sample is asked for.
        scorer.answer = says("1")
        assert await reward(args, sample_of()) == 1.0
        await close_remote()

    asyncio.run(run())
    assert scorer.cancelled.is_set()
    assert len(scorer.received) == 2


def test_connections_are_kept_and_bounded(server, ask):
    async def answer(request, number):
        await asyncio.sleep(0.01)
        return web.Response(text=str(number))

    scorer = server(answer)
    assert sorted(ask(scorer.url, *[sample_of()] * 30, rm_concurrency=4)) == list(range(1, 31))
    assert scorer.most_running <= 4
    assert len(scorer.peers) <= 4


def test_waiting_for_a_connection_does_not_count_against_the_deadline(server, ask):
    async def answer(request, number):
        await asyncio.sleep(0.2)
        return web.Response(text="1")

    scorer = server(answer)
    # Ten in a row take 2 s together.
    assert ask(scorer.url, *[sample_of()] * 10, rm_concurrency=1, rm_url_timeout=1.5) == [1.0] * 10


def test_errors_and_warnings_show_neither_password_nor_query(server, ask, capsys):
    scorer = server([(503, "", {}), (404, "gone", {})])
    url = scorer.url.replace("http://", "http://me:hunter2@") + "?key=hunter2"
    with pytest.raises(ServiceError) as caught:
        ask(url)
    assert scorer.url in str(caught.value)
    assert "hunter2" not in str(caught.value) + capsys.readouterr().out


def test_a_server_cannot_be_asked_outside_of_a_run(args_of):
    with pytest.raises(ConfigError, match="asks a server"):
        grade("remote_rm", "a", "a")
    with pytest.raises(ConfigError, match="pass --rm-url"):
        asyncio.run(reward(args_of(rm_type="remote_rm"), sample_of()))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"rm_type": "remote_rm"}, "pass --rm-url http://HOST:PORT/PATH"),
        ({"rm_type": "remote_rm", "rm_url": "localhost:8000"}, "--rm-url 'localhost:8000' is no address to post to"),
        ({"rm_type": "remote_rm", "rm_url": "ftp://me:hunter2@host/x"}, "--rm-url 'ftp://host/x' is no address"),
        ({"rm_type": "remote_rm", "rm_url": "http://host:port/x"}, "is no address"),
        ({"rm_type": "remote_rm", "rm_url": "http:///x"}, "is no address"),
        ({"rm_type": "f1", "rm_url": "http://host/x"}, "--rm-url is set, and nothing asks it"),
        ({"rm_type": "remote_rm", "rm_url": "http://host/x", "eval_reward_key": "acc"}, "pass --reward-key too"),
        ({"rm_type": "boxed_remote_rm", "rm_url": "http://host/x"}, "leave boxed_ out"),
    ],
)
def test_the_check_refuses_a_server_that_cannot_be_or_is_not_asked(configure, values, problem):
    assert any(problem in text for text in check(configure(**values)))


def test_the_check_knows_the_rewards_that_prompts_name(configure, prompt_file, tmp_path):
    lines = ['{"prompt": "a>", "label": "", "metadata": {"rm_type": "remote_rm"}}', '{"prompt": "b>", "label": ""}']
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(lines))
    assert any("pass --rm-url" in text for text in check(configure(prompt_data=str(file))))
    assert not list(check(configure(prompt_data=str(file), rm_url="http://host/x")))
    file.write_text(lines[0].replace("remote_rm", "mth"))
    assert any(
        "in the prompts' metadata" in text and "'math'" in text for text in check(configure(prompt_data=str(file)))
    )


def test_a_rollout_rides_out_a_server_that_fails_now_and_then(server, worker):
    async def answer(request, number):
        return web.Response(status=503) if number % 3 == 1 else web.Response(text="0.5")

    scorer = server(answer)
    result = worker(rm_type="remote_rm", rm_url=scorer.url).generate(0, "1")
    assert result["batch"]["raw_reward"] == [0.5] * 6
    assert result["metrics"]["rollout/rm_retries"] == len(scorer.received) - 6
    assert result["metrics"]["rollout/rm_seconds"] > 0


def test_a_server_that_stalls_stops_the_run_within_the_error_budget_with_the_sample_saved(server, worker, tmp_path):
    scorer = server(stalls)
    running = worker(rm_type="remote_rm", rm_url=scorer.url, rm_url_timeout=0.2, hook_error_budget="1")
    with pytest.raises(ServiceError) as caught:
        running.generate(0, "1")
    text = str(caught.value)
    assert "gave no score within --rm-url-timeout 0.2 s" in text
    assert "--hook-error-budget 1 allows" in text
    assert list((tmp_path / "run" / "failed").iterdir())
    # Two groups lost for good: each asked, asked again, redrawn, asked, asked again.
    assert len(scorer.received) >= 2 * 2 * 2
