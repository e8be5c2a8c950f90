"""Middleware, agents and tools that answer wrongly or not at all are found."""

import asyncio

import msgspec
import pytest

from miles_api.testing import ConformanceError
from miles_api.testing import check_hook as check


def refused(name, fn, **options):
    with pytest.raises(ConformanceError) as caught:
        check(name, fn, **options)
    return caught.value


class Passes:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


class Refuses(Passes):
    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class AtOnce(Passes):
    """Collects the whole answer and sends it when it is complete."""

    async def __call__(self, scope, receive, send):
        messages = []

        async def keep(message):
            messages.append(message)

        await self.app(scope, receive, keep)
        for message in messages:
            await send(message)


class Silent(Passes):
    async def __call__(self, scope, receive, send):
        pass


class HttpOnly(Passes):
    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            await self.app(scope, receive, send)


class Rewrites(Passes):
    async def __call__(self, scope, receive, send):
        async def changed(message):
            body = message.get("body", b"").replace(b'"output_ids":[4', b'"output_ids":[9')
            await send({**message, "body": body} if "body" in message else message)

        await self.app(scope, receive, changed)


class EndsTwice(Passes):
    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)
        if scope["type"] == "http":
            await send({"type": "http.response.body", "body": b"more"})


class StartsLate(Passes):
    async def __call__(self, scope, receive, send):
        kept = []

        async def later(message):
            kept.append(message)

        await self.app(scope, receive, later)
        for message in reversed(kept):
            await send(message)


class Wraps(Passes):
    """Puts the answer into a list."""

    async def __call__(self, scope, receive, send):
        async def wrapped(message):
            body = b"[" + message.get("body", b"") + b"]"
            await send({**message, "body": body} if "body" in message else message)

        await self.app(scope, receive, wrapped)


class Shouts(Passes):
    async def __call__(self, scope, receive, send):
        async def louder(message):
            body = message.get("body", b"").replace(b"data", b"DATA")
            await send({**message, "body": body} if "body" in message else message)

        await self.app(scope, receive, louder)


class MixesUp(Passes):
    """Sends every answer to whoever asked last."""

    async def __call__(self, scope, receive, send):
        self.send = send
        await asyncio.sleep(0.01)
        last = self.send

        async def elsewhere(message):
            await last(message)

        await self.app(scope, receive, elsewhere)


class Remembers(Passes):
    """Answers every request that comes while another is under way with that one's answer."""

    def __init__(self, app):
        super().__init__(app)
        self.messages = []

    async def __call__(self, scope, receive, send):
        first, mine = not self.messages, []

        async def keep(message):
            mine.append(message)

        await self.app(scope, receive, keep)
        if scope["type"] != "http":
            return
        self.messages.append(mine)
        await asyncio.sleep(0.01)
        for message in mine if first else self.messages[1]:
            await send(message)


class Declares(Rewrites):
    changes_tokens = True


@pytest.mark.parametrize("middleware", [Passes, Refuses, Declares])
def test_a_middleware_that_passes_on_refuses_or_declares_what_it_changes_is_well(middleware):
    assert len(check("router_middleware", middleware).passed) == 5


@pytest.mark.parametrize(
    ("middleware", "problem"),
    [
        (Silent, "neither answered nor passed the request on"),
        (AtOnce, "held a chunk back"),
        (HttpOnly, "did not pass the lifespan scope on"),
        (EndsTwice, "sent more after the end"),
        (StartsLate, "not a start and then a body"),
        (Wraps, "not the engine's JSON object any more"),
        (Shouts, "the streamed body came out as b'DATA"),
        (MixesUp, "neither answered nor passed the request on"),
        (Remembers, "gave one request the answer of another"),
        (Rewrites, "declare changes_tokens"),
    ],
)
def test_a_middleware_that_swallows_delays_or_rewrites_is_found(middleware, problem):
    assert problem in str(refused("router_middleware", middleware))


# Agents and tools


async def never_asks(base_url, prompt, request_kwargs, metadata, **kwargs):
    return {}


async def asks_for_one(base_url, prompt, request_kwargs, metadata, **kwargs):
    import urllib.request

    message = {**request_kwargs, "messages": [{"role": "user", "content": prompt}]}
    url = base_url.replace("/1/", "/0/").replace("/2/", "/0/")
    body = msgspec.json.encode(message)
    await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/chat/completions", body).read())


async def says_text(base_url, prompt, request_kwargs, metadata, **kwargs):
    return "7"


async def tool(name, params):
    return f"{params['a'] + 1}" if name == "add" else f"there is no tool {name}"


async def tool_that_raises(name, params):
    return {"add": "4"}[name]


async def tool_with_a_number(name, params):
    return 3


ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}


@pytest.mark.parametrize(
    ("name", "fn", "problem"),
    [
        ("agent", says_text, "returned a str, not a dict or None"),
        ("agent", never_asks, "made no request to its base_url"),
        ("agent", asks_for_one, "made no request to its base_url"),
        ("execute_tool", tool_that_raises, "raised KeyError: 'no_such_tool'"),
        ("execute_tool", tool_with_a_number, "returned a int, not text"),
        ("tool_specs", {"add": 1}, "is a dict, not a list"),
        ("tool_specs", [{"name": "add"}], "not {\"type\": \"function\""),
        ("tool_specs", [], "is empty"),
        ("tool_specs", [{"type": "function", "function": {"name": "a", "parameters": ["a"]}}], "no JSON schema"),
        ("tool_specs", [ADD, ADD], "names a tool twice"),
        ("tool_specs", [{**ADD, "run": print}], "JSON cannot hold"),
    ],
)  # fmt: skip
def test_an_agent_or_tool_that_does_not_answer_as_its_stub_says_is_found(name, fn, problem):
    assert problem in str(refused(name, fn))


def test_a_tool_of_the_specification_that_answers_with_no_text_is_found(tmp_path):
    async def only_strangers(name, params):
        return 4 if name == "add" else "no such tool"

    async def only_its_own(name, params):
        return "4" if name == "add" else None

    (tmp_path / "tools.py").write_text(f"SPECS = [{ADD!r}]\n")
    specs = f"{tmp_path}/tools.py:SPECS"
    assert refused("execute_tool", only_strangers, generate_tool_specs_path=specs).check == "runs the tool add"
    unknown = refused("execute_tool", only_its_own, generate_tool_specs_path=specs)
    assert unknown.check == "answers a call of a tool that does not exist with text"


def test_a_tool_that_fails_only_when_called_several_times_at_once_is_found():
    running = []

    async def one_at_a_time(name, params):
        running.append(name)
        await asyncio.sleep(0)
        text = "text" if len(running) == 1 else None
        running.clear()
        return text

    assert refused("execute_tool", one_at_a_time).check == "runs several calls at once"


def test_a_tool_is_run_with_arguments_made_from_its_specification(tmp_path):
    (tmp_path / "tools.py").write_text(f"SPECS = [{ADD!r}]\n")
    report = check("execute_tool", tool, generate_tool_specs_path=f"{tmp_path}/tools.py:SPECS")
    assert "runs the tool add" in report.passed
