"""A deterministic request is answered once for each weight version."""

from __future__ import annotations

import asyncio
import json

import pytest

from miles_router.middlewares.response_cache import ResponseCache

GREEDY = {"input_ids": [1, 2], "sampling_params": {"temperature": 0}}


class Model:
    """An engine whose every generation is another one, and whose weights may change."""

    def __init__(self):
        self.version, self.generated, self.finish, self.spans, self.size = "1", 0, "stop", None, 0
        self.has_info, self.path = True, "m"

    async def __call__(self, scope, receive, send):
        body = (await receive()).get("body", b"")
        if scope["path"] in ("/model_info", "/get_model_info"):
            known = self.has_info or scope["path"] == "/get_model_info"
            status, answer = (200, {"model_path": self.path, "weight_version": self.version}) if known else (404, {})
        else:
            self.generated += 1
            meta = {"finish_reason": {"type": self.finish}, "weight_version": self.version}
            if self.spans:
                meta["weight_versions"] = self.spans
            answer = {"text": f"{self.generated}" + "x" * self.size, "meta_info": meta}
            many = isinstance(json.loads(body or b"{}").get("sampling_params"), list)
            status, answer = 200, [answer, answer] if many else answer
        data = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


@pytest.fixture
def cached(serve, routed):
    """`cached(steps, **options)`: run `await steps(model, post, counts)` against one engine behind the cache."""

    def run(steps, **options):
        async def main():
            model = Model()
            async with serve(model) as url, routed(url, middleware=[ResponseCache], brought=options) as r:

                async def post(payload=GREEDY, **how):
                    reply = await r.post(json=payload, **how)
                    assert reply.status_code == 200
                    return reply.headers.get("x-miles-cache"), reply.json()

                async def counts():
                    return (await r.client.get("/hooks")).json()["hooks"][0]["counts"]

                await steps(model, post, counts)

        asyncio.run(main())

    return run


@pytest.mark.parametrize(
    "payload",
    [
        GREEDY,
        {"text": "x", "sampling_params": {"temperature": 0.7, "sampling_seed": 3}},
        {"input_ids": [[1], [2]], "sampling_params": [{"temperature": 0}, {"sampling_seed": 0}]},
    ],
)
def test_a_request_that_repeats_itself_is_generated_once(cached, payload):
    async def steps(model, post, counts):
        first, second = await post(payload), await post(payload)
        assert (first[0], second[0], first[1]) == ("miss", "hit", second[1])
        assert model.generated == 1
        assert (await counts())["hits"] == 1

    cached(steps)


@pytest.mark.parametrize(
    "payload",
    [
        {"text": "x"},
        {"text": "x", "sampling_params": {}},
        {"text": "x", "sampling_params": {"temperature": 0.5}},
        {"text": "x", "sampling_params": {"temperature": 0}, "stream": True},
        {"input_ids": [[1], [2]], "sampling_params": [{"temperature": 0}, {"temperature": 1}]},
    ],
)
def test_what_may_differ_is_generated_each_time(cached, payload):
    async def steps(model, post, counts):
        assert (await post(payload))[0] is None
        assert (await post(payload))[0] is None
        assert model.generated == 2

    cached(steps)


@pytest.mark.parametrize("has_info", [True, False])
def test_other_weights_answer_anew_and_each_version_for_itself(cached, has_info):
    async def steps(model, post, counts):
        model.has_info = has_info
        await post()
        model.version = "2"
        state, reply = await post()
        assert (state, reply["text"], reply["meta_info"]["weight_version"]) == ("miss", "2", "2")
        assert (await post())[0] == "hit"

    cached(steps)


def test_answers_of_an_abort_or_of_two_versions_are_not_kept(cached):
    async def steps(model, post, counts):
        model.finish = "abort"
        await post()
        model.finish, model.spans = "stop", [{"version": "1"}, {"version": "2"}]
        await post()
        model.spans, model.version = None, None
        await post()
        assert (await post())[0] == "miss"
        assert await counts() == {"hits": 0, "misses": 4, "entries": 0, "bytes": 0}

    cached(steps)


@pytest.mark.parametrize("version", ["default", ""])
def test_a_version_that_nobody_set_says_nothing_so_nothing_is_kept_under_it(cached, version):
    async def steps(model, post, counts):
        model.version = version
        for text in ("1", "2"):
            state, reply = await post()
            assert (state, reply["text"]) == ("miss", text)
        assert (await counts())["entries"] == 0

    cached(steps)


def test_another_model_of_the_same_version_answers_anew(cached):
    async def steps(model, post, counts):
        await post()
        model.path = "other"
        state, reply = await post()
        assert (state, reply["text"]) == ("miss", "2")
        assert (await post())[0] == "hit"

    cached(steps)


class Pin:
    """Lets a request go where its header says: `choose` to that engine alone, `prefer` rather there."""

    changes_tokens = False

    def __init__(self, app, *, router):
        self.app, self.router = app, router

    async def __call__(self, scope, receive, send):
        for name, value in scope["headers"]:
            if name in (b"x-choose", b"x-prefer"):
                getattr(self.router, name[2:].decode())(scope, value.decode())
        await self.app(scope, receive, send)


@pytest.mark.parametrize("how", ["x-choose", "x-prefer", "x-miles-weight-version"])
@pytest.mark.parametrize("versions", ["11", "12"])
def test_each_engine_that_a_request_is_meant_for_has_its_own_answer(serve, routed, how, versions):
    async def main():
        models = Model(), Model()
        for number, (model, version) in enumerate(zip(models, versions, strict=True)):
            model.version, model.generated = version, 10 * number
        async with serve(models[0]) as a, serve(models[1]) as b, routed(middleware=[Pin, ResponseCache]) as r:
            for url, version in ((a, versions[0]), (b, versions[1])):
                r.app.registry.add(url, version)
            meant = versions if how.endswith("version") else (a, b)
            got = [await r.post(json=GREEDY, headers={how: meant[i]}) for i in (0, 1, 0, 1)]
            said = [(reply.headers["x-miles-cache"], reply.json()["text"]) for reply in got]
            if len(set(meant)) == 2:
                assert said == [("miss", "1"), ("miss", "11"), ("hit", "1"), ("hit", "11")]

    asyncio.run(main())


def test_a_request_that_differs_in_anything_is_another(cached):
    async def steps(model, post, counts):
        await post()
        assert (await post({**GREEDY, "return_logprob": True}))[0] == "miss"
        assert (await post(params={"x": "1"}))[0] == "miss"
        assert (await post(headers={"authorization": "Bearer other"}))[0] == "miss"
        assert (await post())[0] == "hit"

    cached(steps)


def test_the_cache_is_bounded_and_what_was_unused_for_longest_goes(cached):
    async def steps(model, post, counts):
        model.size = 1000
        for number in (0, 1, 0, 2):
            await post({**GREEDY, "input_ids": [number]})
        held = await counts()
        assert held["entries"] == 2
        assert held["bytes"] <= 4000
        assert (await post({**GREEDY, "input_ids": [0]}))[0] == "hit"
        assert (await post({**GREEDY, "input_ids": [1]}))[0] == "miss"
        model.size = 5000
        await post({**GREEDY, "input_ids": [9]})
        assert (await post({**GREEDY, "input_ids": [9]}))[0] == "miss"
        assert (await counts())["bytes"] <= 4000

    cached(steps, response_cache_bytes=4000)
