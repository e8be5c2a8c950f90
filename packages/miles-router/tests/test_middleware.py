"""Middleware around the router: what it may do, what it is told, and what happens when it fails."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import logging

import pytest

from miles_api.config import RunConfig
from miles_api.errors import ConfigError, ServiceError
from miles_router import Router, RouterOptions
from miles_router.check import HOOKS, idle
from miles_router.command import command
from miles_router.middleware import resolve_middleware
from miles_router.service import create

PASSING = """
class Passing:
    changes_tokens = True
    def __init__(self, app):
        self.app = app
    async def __call__(self, scope, receive, send):
        print("saw", scope["path"])
        await self.app(scope, receive, send)
"""
FAILING = """
class Failing:
    def __init__(self, app, *, router):
        self.app = app
    async def __call__(self, scope, receive, send):
        if scope["path"] == "/generate":
            raise KeyError("no such thing")
        await self.app(scope, receive, send)
"""


class Passing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


async def hook_of(r, name, **headers):
    rows = (await r.client.get("/hooks", headers=headers)).json()["hooks"]
    return next(row for row in rows if row["reference"] == f"test:{name}")


def test_middleware_sees_every_request_and_the_first_is_outermost(serve, routed, engine):
    seen = []

    class Outer(Passing):
        async def __call__(self, scope, receive, send):
            seen.append(("outer", scope["path"]))
            await self.app(scope, receive, send)

    class Inner(Passing):
        async def __call__(self, scope, receive, send):
            seen.append(("inner", scope["path"]))
            await self.app(scope, receive, send)

    async def main():
        async with serve(engine()) as url, routed(url, middleware=[Outer, Inner]) as r:
            await r.post("/generate", content=b"x")
            await r.client.get("/workers")
            await r.client.get("/health")
            assert (await hook_of(r, "Outer"))["calls"] == 2

    asyncio.run(main())
    assert seen == [(name, path) for path in ("/generate", "/workers") for name in ("outer", "inner")]


def test_middleware_may_reject_and_change_what_passes(serve, routed, engine):
    class Gate(Passing):
        async def __call__(self, scope, receive, send):
            if (b"x-tenant", b"bad") in scope["headers"]:
                await send({"type": "http.response.start", "status": 429, "headers": []})
                await send({"type": "http.response.body", "body": b"slow down"})
                return
            await self.app({**scope, "headers": [*scope["headers"], (b"x-seen", b"1")]}, receive, send)

    async def main():
        backend = engine()
        async with serve(backend) as url, routed(url, middleware=[Gate]) as r:
            refused = await r.post(content=b"x", headers={"x-tenant": "bad"})
            assert (refused.status_code, refused.content, backend.requests) == (429, b"slow down", [])
            assert (await r.post(content=b"x")).status_code == 200
            assert (b"x-seen", b"1") in backend.requests[0][0]["headers"]

    asyncio.run(main())


@pytest.mark.parametrize("said", [KeyError("oops"), {"a": object()}, {1, 2}])
def test_counts_that_fail_are_an_error_of_their_middleware_and_the_report_comes(serve, routed, engine, said, caplog):
    class Miscounting(Passing):
        def counts(self):
            if isinstance(said, Exception):
                raise said
            return said

    class Counting(Passing):
        def counts(self):
            return {"a": 1}

    async def main():
        async with serve(engine()) as url, routed(url, middleware=[Miscounting, Counting]) as r:
            bad, good = (await r.client.get("/hooks")).json()["hooks"]
            assert (bad["counts"], bad["errors"], good["counts"], good["errors"]) == ({}, 1, {"a": 1}, 0)
            assert "router middleware test:Miscounting" in caplog.text
            assert "counts()" in caplog.text

    asyncio.run(main())


def test_middleware_sees_the_workers_and_may_choose_one(serve, routed, engine):
    class Picky:
        def __init__(self, app, *, router):
            self.app, self.router = app, router

        async def __call__(self, scope, receive, send):
            self.router.prefer(scope, self.router.workers[-1].url)
            await self.app(scope, receive, send)

    async def main():
        first, last = engine(), engine()
        async with serve(first) as a, serve(last) as b, routed(a, b, middleware=[Picky]) as r:
            for _ in range(4):
                await r.post(content=b"x")
            assert (len(first.requests), len(last.requests)) == (0, 4)
            next(w for w in r.app.registry if w.url == b).healthy = False
            r.app.registry._refresh()
            assert (await r.post(content=b"x")).status_code == 200
            assert len(first.requests) == 1

    asyncio.run(main())


def test_a_middleware_that_raises_is_named_and_counted_and_the_router_lives(serve, routed, engine, caplog):
    class Broken(Passing):
        async def __call__(self, scope, receive, send):
            if scope["path"] == "/generate":
                raise KeyError("no such thing")
            await self.app(scope, receive, send)

    async def main():
        async with serve(engine()) as url, routed(url, middleware=[Passing, Broken]) as r:
            for _ in range(5):
                reply = await r.post(content=b"x")
                assert reply.status_code == 500
                message = "router middleware test:Broken raised KeyError: 'no such thing'"
                assert reply.json()["error"] == {"message": message, "type": "middleware", "code": 500}
            assert (await r.client.get("/v1/models")).status_code == 200
            broken, passing = await hook_of(r, "Broken"), await hook_of(r, "Passing")
            assert (broken["calls"], broken["errors"]) == (6, 5)
            assert (passing["calls"], passing["errors"]) == (6, 0)

    asyncio.run(main())
    # the first, the second and the fourth
    assert len([record for record in caplog.records if record.exc_info and record.levelno == logging.ERROR]) == 3


def test_a_middleware_that_neither_answers_nor_passes_on_is_named(serve, routed, engine):
    class Forgetful(Passing):
        async def __call__(self, scope, receive, send):
            return

    async def main():
        async with serve(engine()) as url, routed(url, middleware=[Forgetful]) as r:
            reply = await r.post(content=b"x")
            assert reply.status_code == 500
            assert "test:Forgetful neither answered nor passed the request on" in reply.text
            assert (await hook_of(r, "Forgetful"))["errors"] == 1

    asyncio.run(main())


def test_a_middleware_may_pass_requests_on_from_a_task_of_its_own(serve, routed, engine):
    class Batching(Passing):
        def __init__(self, app):
            super().__init__(app)
            self.waiting = asyncio.Queue()
            self.worker = asyncio.get_running_loop().create_task(self.work())

        async def work(self):
            while True:
                request, done = await self.waiting.get()
                await self.app(*request)
                done.set_result(None)

        async def __call__(self, *request):
            done = asyncio.get_running_loop().create_future()
            await self.waiting.put((request, done))
            # Who asks must not wait for a worker that has died.
            await asyncio.wait({done, self.worker}, return_when=asyncio.FIRST_COMPLETED)

    async def main():
        async with serve(engine()) as url, routed(url, middleware=[Batching]) as r:
            assert [(await r.post()).status_code for _ in range(2)] == [200, 200]
            row = await hook_of(r, "Batching")
            assert (row["calls"], row["errors"]) == (2, 0)

    asyncio.run(main())


def test_an_error_inside_is_not_blamed_on_the_middleware_around_it(routed, monkeypatch):
    async def main():
        async with routed(middleware=[Passing]) as r:

            async def fail(*_):
                raise RuntimeError("a defect of the router")

            monkeypatch.setattr(r.app, "_proxy", fail)
            reply = await r.post(content=b"x")
            assert (reply.status_code, reply.content) == (500, b"Internal Server Error")
            assert (await hook_of(r, "Passing"))["errors"] == 0

    asyncio.run(main())


def test_the_time_of_a_middleware_is_its_own_without_that_of_the_engine(serve, routed, engine):
    async def main():
        backend = engine()
        backend.gate = asyncio.Event()
        async with serve(backend) as url, routed(url, middleware=[Passing]) as r:
            request = asyncio.create_task(r.post(content=b"x"))
            await r.until(lambda row: row["outstanding"] == 1)
            began = asyncio.get_running_loop().time()
            await asyncio.sleep(0.2)
            waited = asyncio.get_running_loop().time() - began
            backend.gate.set()
            await request
            assert (await hook_of(r, "Passing"))["seconds"] < waited / 2

    asyncio.run(main())


def test_who_lacks_the_token_reaches_no_middleware_and_no_middleware_sees_it(routed):
    class Curious(Passing):
        def __init__(self, app, *, router):
            super().__init__(app)
            assert router.options.router_policy == "round_robin"
            assert router.options.router_token is None

    async def main():
        options = {"router_token": "s3cret", "router_policy": "round_robin"}
        async with routed(middleware=[Passing, Curious], **options) as r:
            assert (await r.post(content=b"x")).status_code == 401
            assert (await r.client.get("/hooks")).status_code == 401
            assert (await r.client.get("/")).status_code == 200
            token = {"authorization": "Bearer s3cret"}
            assert (await hook_of(r, "Passing", **token))["calls"] == 0
            assert (await r.client.get("/workers", headers={**token, "origin": "http://evil"})).status_code == 403

    asyncio.run(main())


def test_without_middleware_there_is_no_report_to_ask_for(routed):
    async def main():
        async with routed() as r:
            assert (await r.client.get("/hooks")).status_code == 404

    asyncio.run(main())
    assert Router(RouterOptions()).report() == []


@pytest.fixture
def references(tmp_path):
    for name, text in (("passing", PASSING), ("failing", FAILING)):
        (tmp_path / f"{name}.py").write_text(text)
    return [f"{tmp_path}/passing.py:Passing", f"{tmp_path}/failing.py:Failing"]


def _post(url, path):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("POST", path, b"{}")
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_the_child_resolves_the_middleware_and_reports_for_itself(references, tmp_path, capfd):
    config = RunConfig.of(RouterOptions()).replace("test", miles_router_middleware_paths=references)
    router = create(config)
    url = router.start()
    try:
        status, answer = _post(url, "/generate")
        assert (status, answer["error"]["type"]) == (500, "middleware")
        assert references[1] in answer["error"]["message"]
        passing, failing = router.report()
    finally:
        router.stop()
    assert [row["reference"] for row in (passing, failing)] == references
    assert (passing["calls"], passing["errors"], failing["calls"], failing["errors"]) == (1, 0, 1, 1)
    assert passing["sha256"] == hashlib.sha256((tmp_path / "passing.py").read_bytes()).hexdigest()
    assert (passing["changes_tokens"], failing["changes_tokens"]) == (True, False)
    assert "miles-router: saw /generate\n" in capfd.readouterr().out


def test_a_middleware_that_cannot_be_built_ends_the_start_with_its_own_words(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(PASSING.replace("self.app = app", "raise ValueError('no room')"))
    router = Router(RouterOptions(), [f"{file}:Passing"])
    with pytest.raises(ServiceError, match="no room"):
        router.start()


def test_every_middleware_that_does_not_load_or_fit_is_named(references, tmp_path):
    assert frozenset({"router_middleware"}) == HOOKS
    (tmp_path / "odd.py").write_text("class Odd:\n    def __init__(self): ...\n    async def __call__(self, *a): ...\n")
    with pytest.raises(ConfigError) as error:
        resolve_middleware([f"{tmp_path}/odd.py:Odd", f"{tmp_path}/passing.py:Pasing", references[0]])
    assert "miles calls: router_middleware(app, /, *, router)" in str(error.value)
    assert "did you mean 'Passing'" in str(error.value)


def test_middleware_is_idle_where_no_router_starts():
    config = RunConfig.of(RouterOptions())
    assert idle(config) == {}
    assert "router_middleware" in idle(config.replace("test", loss_type="sft_loss"))


def test_the_command_takes_middleware_in_order(references, monkeypatch):
    ran = []
    monkeypatch.setattr("miles_router.server.run_router", lambda *args, **kwargs: ran.append(kwargs["middleware"]))
    parser = argparse.ArgumentParser()
    command.configure(parser)
    command.run(parser.parse_args(["--miles-router-middleware-paths", ",".join(references)]))
    command.run(parser.parse_args([f"--miles-router-middleware-paths={reference}" for reference in references]))
    assert [[hook.reference for hook in hooks] for hooks in ran] == [references, references]
    with pytest.raises(ConfigError, match="there is no file"):
        command.run(parser.parse_args(["--miles-router-middleware-paths", "nowhere.py:X"]))
