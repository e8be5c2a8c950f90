"""The key of engines: where it comes from, what is none, and where engines are reached."""

from __future__ import annotations

import pytest

from miles_api.errors import ConfigError
from miles_rollout.engines.addresses import bound_socket, url_of
from miles_rollout.engines.key import given_key, key_for
from miles_rollout.options import EngineFleetOptions


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_engines_on_loopback_need_no_key(host):
    assert key_for(EngineFleetOptions(engine_host=host)) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "engine.example"])
def test_engines_that_others_could_reach_get_a_new_key_each_time(host):
    keys = {key_for(EngineFleetOptions(engine_host=host)) for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) > 32
    assert not any(key.startswith("-") for key in keys)


def test_the_users_own_key_is_taken_wherever_engines_listen(monkeypatch):
    monkeypatch.setenv("OUR_KEY", "sk-0.x~y_z+/==")
    for host in ("127.0.0.1", "0.0.0.0"):
        assert key_for(EngineFleetOptions(engine_host=host, engine_key_variable="OUR_KEY")) == "sk-0.x~y_z+/=="


@pytest.mark.parametrize("value", ["", "two words", "-flag", "a\r\nx: y", 'quo"te', "schlüssel", "=="])
def test_what_is_no_key_is_refused_by_the_name_of_its_variable_and_not_shown(value, monkeypatch):
    monkeypatch.setenv("OUR_KEY", value)
    with pytest.raises(ConfigError, match="--engine-key-variable OUR_KEY") as caught:
        given_key(EngineFleetOptions(engine_key_variable="OUR_KEY"))
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(("host", "node", "reached"), [
    ("127.0.0.1", "10.0.0.7", "http://127.0.0.1:"),
    ("0.0.0.0", "10.0.0.7", "http://10.0.0.7:"),
    ("::1", "", "http://[::1]:"),
    ("::", "fd00::7", "http://[fd00::7]:"),
])  # fmt: skip
def test_an_engine_on_every_address_is_reached_at_that_of_its_node(host, node, reached):
    with bound_socket(0, EngineFleetOptions(engine_host=host)) as sock:
        assert url_of(sock, node).startswith(reached)


def test_without_a_node_it_is_an_address_that_can_be_connected_to():
    with bound_socket(0, EngineFleetOptions(engine_host="0.0.0.0")) as sock:
        assert "0.0.0.0" not in url_of(sock)
