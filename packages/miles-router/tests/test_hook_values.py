"""The options that middleware brings reach the router's process, from a run and from `miles router` alike."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys

import pytest

from miles_api.config import RunConfig
from miles_api.errors import ConfigError
from miles_api.parsing.parse import parse_run
from miles_router import RouterOptions, hook_values
from miles_router.command import command
from miles_router.options import READY_PREFIX
from miles_router.service import create

STRUCT = """
import json
from typing import Annotated
import msgspec

class EchoOptions(msgspec.Struct, frozen=True, kw_only=True):
    echo_words: list[str] = msgspec.field(default_factory=lambda: ["default"])
    \"\"\"What to answer.\"\"\"
    echo_times: Annotated[int, msgspec.Meta(ge=1)] = 1
    echo_key: Annotated[str, msgspec.Meta(extra={"secret": True})] | None = None

class Echo:
    options = EchoOptions
    changes_tokens = False
    def __init__(self, app, *, router):
        self.app, self.args = app, router.args
    async def __call__(self, scope, receive, send):
        if scope["path"] != "/generate":
            return await self.app(scope, receive, send)
        args = self.args
        said = [args.echo_words * args.echo_times, args.echo_key, args.router_policy, args.router_token]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})
"""
PARSER = """
def add_arguments(parser):
    parser.add_argument("--pair", type=int, nargs=2, default=(1, 2))

class Parsed:
    def __init__(self, app, *, router):
        self.app = app
        print("pair is", router.args.pair, flush=True)
    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)

Parsed.add_arguments = staticmethod(add_arguments)
"""


@pytest.fixture
def echo(tmp_path):
    (tmp_path / "echo.py").write_text(STRUCT)
    return f"{tmp_path}/echo.py:Echo"


def ask(url):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("POST", "/generate", b"{}")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def test_the_options_of_a_run_reach_the_middleware_and_no_process_list(echo, tmp_path):
    (tmp_path / "run.toml").write_text(
        '[hooks.router_middleware]\necho_words = ["a", "b"]\necho_key = "s3cret"\n[router]\nrouter_policy = "random"\n'
    )
    flags = ["--miles-router-middleware-paths", echo, "--echo-times", "2"]
    config = parse_run([str(tmp_path / "run.toml"), *flags])
    assert "s3cret" not in config.to_toml()
    router = create(config)
    url = router.start()
    try:
        assert ask(url) == [["a", "b", "a", "b"], "s3cret", "random", None]
        assert "s3cret" not in " ".join(router._process.args)
    finally:
        router.stop()


def test_options_that_a_run_does_not_set_have_their_defaults(echo):
    router = create(RunConfig.of(RouterOptions()).replace("test", miles_router_middleware_paths=[echo]))
    url = router.start()
    try:
        assert ask(url)[:2] == [["default"], None]
    finally:
        router.stop()


def test_options_of_other_hooks_are_none_of_the_routers(echo, tmp_path):
    (tmp_path / "reward.py").write_text(
        "import msgspec\nclass Mine(msgspec.Struct):\n    key: str = 'k'\ndef fn(args, sample): return 1.0\n"
        "fn.options = Mine\n"
    )
    flags = ["--miles-router-middleware-paths", echo, "--custom-rm-path", f"{tmp_path}/reward.py:fn", "--key", "s3cret"]
    config = parse_run(flags)
    assert set(hook_values.from_run(config, [echo])) == {"echo_words", "echo_times", "echo_key"}


def test_the_command_takes_the_flags_that_its_middleware_brings(echo, tmp_path):
    (tmp_path / "parsed.py").write_text(PARSER)
    flags = ["--miles-router-middleware-paths", f"{echo},{tmp_path}/parsed.py:Parsed", "--echo-words", "x"]
    words = [sys.executable, "-m", "miles_router", *flags, "--pair", "3", "4", "--token", "t"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = [process.stdout.readline().strip(), process.stdout.readline().strip()]
        finally:
            process.terminate()
    assert said[0] == "pair is [3, 4]"
    assert said[1].startswith(READY_PREFIX)


def test_what_a_shell_still_holds_does_not_override_the_flags(echo, monkeypatch):
    started = []
    monkeypatch.setattr("miles_router.server.run_router", lambda *given, middleware, **more: started.extend(middleware))
    monkeypatch.setenv(hook_values.VALUES_VARIABLE, '{"echo_words": ["stale"], "echo_times": 9, "echo_key": null}')
    command.main(["--miles-router-middleware-paths", echo, "--echo-times", "2"])
    assert (started[0].view.echo_words, started[0].view.echo_times) == (["default"], 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--echo-times", "0"], "--echo-times = '0': Expected `int` >= 1"),
        (["--echo-timez", "2"], "unknown flag --echo-timez; did you mean '--echo-times'?"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(echo, capsys, flags, said):
    with pytest.raises((ConfigError, SystemExit)) as error:
        command.main(["--miles-router-middleware-paths", echo, *flags])
    assert said in str(error.value) + capsys.readouterr().err


def test_the_help_shows_what_the_middleware_brings(echo, capsys):
    with pytest.raises(SystemExit):
        command.main(["--miles-router-middleware-paths", echo, "--help"])
    assert "What to answer." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["router_policy", "worker"])
def test_an_option_with_the_name_of_one_of_the_routers_is_refused(tmp_path, name):
    (tmp_path / "greedy.py").write_text(STRUCT.replace("echo_key", name))
    with pytest.raises(ConfigError, match=name.replace("_", "[-_]")):
        command.main(["--miles-router-middleware-paths", f"{tmp_path}/greedy.py:Echo"])


def test_values_survive_the_way_to_the_process(monkeypatch):
    values = {"pair": (1, 2), "table": {"a": [1.5, None]}, "infinite": float("inf")}
    for name, text in hook_values.to_environment(values).items():
        monkeypatch.setenv(name, text)
    assert hook_values.from_environment() == values
