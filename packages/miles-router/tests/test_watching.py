"""What the router says of itself and of its engines: metrics, status, its page, and answers put together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess

import pytest

_CHROMIUM = shutil.which("chromium")
_SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)+)\})? (\S+)')


def _samples(text):
    """Return the samples of a Prometheus text by name and labels; every line has to be one, or a comment."""
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = _SAMPLE.fullmatch(line).groups()
            samples[name, labels or ""] = float(value)
    return samples


def test_metrics_count_requests_by_status_and_show_each_worker(serve, routed, engine):
    async def main():
        good, bad = engine(), engine(status=422)
        async with serve(good) as a, serve(bad) as b, routed(a, b, router_policy="round_robin") as r:
            for _ in range(6):
                await r.post()
            await r.client.get("/nothing")
            answer = await r.client.get("/metrics")
        samples = _samples(answer.text)
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert samples["miles_router_requests_total", 'status="200"'] == 3
        assert samples["miles_router_requests_total", 'status="422"'] == 3
        assert samples["miles_router_request_seconds_count", ""] == 6
        assert samples["miles_router_request_seconds_bucket", 'le="+Inf"'] == 6
        assert 0 < samples["miles_router_request_seconds_sum", ""] < 60
        for url in (a, b):
            labels = f'worker="{url}"'
            assert samples["miles_router_worker_requests_total", labels] == 3
            assert samples["miles_router_worker_healthy", labels] == 1
            assert samples["miles_router_worker_outstanding_requests", labels] == 0

    asyncio.run(main())


def test_metrics_show_what_goes_wrong_and_what_is_under_way(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        dead = "http://127.0.0.1:1"
        limits = {"router_max_worker_requests": 1, "router_health_interval": 3600}
        async with serve(target) as url, routed(dead, **limits) as r:
            assert (await r.post()).status_code == 503
            r.app.registry.add(url, 'seven "of" nine')
            held = [asyncio.create_task(r.post()) for _ in range(2)]
            while not _samples((await r.client.get("/metrics")).text)["miles_router_queued_requests", ""]:
                await asyncio.sleep(0.005)
            text = (await r.client.get("/metrics")).text
            target.gate.set()
            await asyncio.gather(*held)
        assert f'miles_router_worker_outstanding_requests{{worker="{url}"}} 1\n' in text
        assert f'miles_router_worker_info{{worker="{url}",weight_version="seven \\"of\\" nine"}} 1\n' in text
        labels = f'{{worker="{dead}"}}'
        for line in ("healthy%s 0", "quarantines_total%s 1", "failures_total%s 1", "requests_total%s 1"):
            assert f"miles_router_worker_{line % labels}\n" in text
        assert 'miles_router_requests_total{status="503"} 1\n' in text

    asyncio.run(main())


def test_the_seconds_of_a_request_that_is_refused_are_counted(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        limits = {"router_max_worker_requests": 1, "router_queue_timeout": 0.2}
        async with serve(target) as url, routed(url, **limits) as r:
            held = asyncio.create_task(r.post())
            await r.until(lambda row: row["outstanding"] == 1)
            assert (await r.post()).status_code == 503
            latency = (await r.client.get("/status")).json()["latency"]
            target.gate.set()
            await held
        assert latency["seconds"] >= 0.2

    asyncio.run(main())


def test_an_engine_may_list_no_models_or_nonsense(serve, routed, engine):
    async def main():
        bodies = [b'{"data": null}', b'{"data": [3, {"id": ["m"]}]}', b'{"data": {}}', b'{"data": [{"id": "m"}]}']
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(serve(engine(body))) for body in bodies]
            async with routed(*urls) as r:
                answer = await r.client.get("/v1/models")
        assert [model["id"] for model in answer.json()["data"]] == [["m"], "m"]

    asyncio.run(main())


@pytest.mark.parametrize(("path", "key"), [("/v1/models", "data"), ("/server_info", "workers")])
def test_engines_that_middleware_did_not_choose_are_not_asked(serve, routed, engine, path, key):
    class Chooses:
        def __init__(self, app, *, router):
            self.app, self.router = app, router

        async def __call__(self, scope, receive, send):
            self.router.choose(scope, *(worker.url for worker in self.router.workers[:2]))
            await self.app(scope, receive, send)

    async def main():
        engines = [engine(b'{"data": [{"id": "m%d"}]}' % n) for n in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(serve(one)) for one in engines]
            async with routed(*urls, middleware=[Chooses]) as r:
                answer = (await r.client.get(path)).json()
        assert len(answer[key]) == 2
        assert [len(one.requests) + one.questions for one in engines] == [1, 1, 0]

    asyncio.run(main())


def test_models_of_several_engines_are_listed_once_each(serve, routed, engine):
    def models(*names):
        return json.dumps({"object": "list", "data": [{"id": name, "max_model_len": 8} for name in names]}).encode()

    async def main():
        a, b, broken = engine(models("m", "lora-1")), engine(models("m", "lora-2")), engine(b"no", status=500)
        async with serve(a) as one, serve(b) as two, serve(broken) as three, routed(one, two, three) as r:
            answer = (await r.client.get("/v1/models")).json()
        assert answer["object"] == "list"
        assert [model["id"] for model in answer["data"]] == ["m", "lora-1", "lora-2"]
        assert answer["data"][0]["max_model_len"] == 8

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_of_several_engines_holds_that_of_each(serve, routed, path):
    def info(tokens):
        async def app(scope, receive, send):
            body = json.dumps({"model_path": "m", "max_total_num_tokens": tokens}).encode()
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
            )
            await send({"type": "http.response.body", "body": body})

        return app

    async def main():
        async with serve(info(100)) as a, serve(info(200)) as b, routed(a, b) as r:
            answer = (await r.client.get(path)).json()
        assert (answer["model_path"], answer["max_total_num_tokens"]) == ("m", 100)
        assert [(row["url"], row["max_total_num_tokens"]) for row in answer["workers"]] == [(a, 100), (b, 200)]

    asyncio.run(main())


def test_if_no_engine_says_what_it_is_the_answer_names_all_of_them(serve, routed, engine):
    async def main():
        a, b = engine(b"{", 200), engine(b"", 404)
        async with serve(a) as one, serve(b) as two, routed(one, two) as r:
            answer = await r.client.get("/v1/models")
        assert answer.status_code == 503
        assert f"{one} answers /v1/models with something unreadable" in answer.json()["error"]["message"]
        assert f"{two} answers /v1/models with 404" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_the_one_engine_answers_for_itself_byte_for_byte(serve, routed, engine):
    async def main():
        odd = b'{"object":  "list", "data": [], "of tomorrow": 1e400}'
        async with serve(engine(odd)) as url, routed(url) as r:
            assert (await r.client.get("/v1/models")).content == odd

    asyncio.run(main())


def test_the_page_needs_no_token_and_holds_nothing_but_what_it_shows_needs_it(routed):
    async def main():
        async with routed("http://127.0.0.1:1", router_token="s3cret") as r:
            page = await r.client.get("/")
            assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert "s3cret" not in page.text
            assert "127.0.0.1:1" not in page.text
            for path in ("/status", "/metrics"):
                assert (await r.client.get(path)).status_code == 401
                good = await r.client.get(path, headers={"authorization": "Bearer s3cret"})
                assert "http://127.0.0.1:1" in good.text
            assert (await r.post("/")).status_code == 405

    asyncio.run(main())


def test_the_page_loads_nothing_from_elsewhere_and_may_not(routed):
    async def main():
        async with routed() as r:
            page = await r.client.get("/")
        assert not re.search(r"""(src|href)\s*=|url\(|@import|https?:""", page.text)
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; connect-src 'self'; frame-ancestors 'none'")
        assert "unsafe" not in policy

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/status", "/metrics"])
def test_under_a_foreign_name_the_router_shows_nothing(routed, path):
    async def main():
        async with routed("http://127.0.0.1:1") as r:
            for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example"):
                assert (await r.client.get(path, headers={"host": host})).status_code == 403
            for host in ("localhost", "LOCALHOST:30000", "127.0.0.1", "[::1]:8", "10.0.0.1:30000"):
                assert (await r.client.get(path, headers={"host": host})).status_code == 200
        async with routed("http://127.0.0.1:1", router_token="t") as r:
            headers = {"host": "router.cluster", "authorization": "Bearer t"}
            assert (await r.client.get(path, headers=headers)).status_code == 200

    asyncio.run(main())


def test_the_page_passes_by_middleware(routed):
    class Refuses:
        def __init__(self, app, *, router):
            pass

        async def __call__(self, scope, receive, send):
            raise RuntimeError("no")

    async def main():
        async with routed(middleware=[Refuses], router_token="t") as r:
            assert "<title>Miles router</title>" in (await r.client.get("/")).text

    asyncio.run(main())


def _shown(tmp_path, url):
    """Return the page as a browser has it after some seconds."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command = [_CHROMIUM, *flags, f"--user-data-dir={tmp_path}", "--dump-dom", url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout


@pytest.mark.skipif(_CHROMIUM is None, reason="there is no chromium")
def test_the_page_follows_what_happens_without_being_loaded_again(serve, routed, engine, tmp_path):
    loads, looks = 0, 0

    async def main():
        target = engine()
        target.weight_version, target.gate = "7", asyncio.Event()
        async with serve(target) as url, routed(url, router_max_worker_requests=1) as r:
            page, handler = r.app.front_page, r.app._routes["/status"]["GET"]

            async def loading(scope, send):
                nonlocal loads
                loads += 1
                await page(scope, send)

            def looking(call):
                nonlocal looks
                looks += 1
                return handler(call)

            r.app.front_page, r.app._routes["/status"]["GET"] = loading, looking
            showing = asyncio.create_task(asyncio.to_thread(_shown, tmp_path, r.url))
            while not looks:  # of what follows the page knows nothing yet
                await asyncio.sleep(0.01)
            held = [asyncio.create_task(r.post()) for _ in range(3)]
            r.app.registry.add("http://127.0.0.1:2", "6")
            await r.client.post("/weight_version", json={"weight_version": "7"})
            shown = await showing
            target.gate.set()
            await asyncio.gather(*held)
        assert loads == 1
        assert looks > 1
        assert '<dd id="outstanding">1</dd>' in shown
        assert '<dd id="queued">2</dd>' in shown
        assert '<dd id="weights">7</dd>' in shown
        assert "http://127.0.0.1:2" in shown
        assert "quarantined: cannot be connected" in shown

    asyncio.run(main())


@pytest.mark.skipif(_CHROMIUM is None, reason="there is no chromium")
def test_a_browser_shows_the_workers_and_their_numbers_to_who_has_the_token(serve, routed, engine, tmp_path):
    async def main():
        token, auth = "s3/cr?t", {"authorization": "Bearer s3/cr?t"}
        async with serve(engine()) as url, routed("http://127.0.0.1:1", url, router_token=token) as r:
            r.app.registry.add(url, "<b>7</b>")
            dumping = asyncio.create_task(asyncio.to_thread(_shown, tmp_path, f"{r.url}/#token=s3%2Fcr%3Ft"))
            while not dumping.done():
                assert (await r.post(headers=auth)).status_code == 200
                await asyncio.sleep(0.01)
            shown = await dumping
            assert "needs its token" in await asyncio.to_thread(_shown, tmp_path, r.url)
        assert f"<td>{url}</td>" in shown
        assert "quarantined: cannot be connected" in shown
        assert "<td>&lt;b&gt;7&lt;/b&gt;</td>" in shown
        assert re.search(r'<dd id="statuses">200: \d+</dd>', shown)
        assert re.search(r'<dd id="p50">≈ \d+ ms</dd>', shown)

    asyncio.run(main())
