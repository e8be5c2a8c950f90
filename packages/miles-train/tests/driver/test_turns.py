"""Who has the memory: engines release it before the trainer trains, and have it back before they get weights."""

from __future__ import annotations

import pytest

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_train.driver import turns as module
from miles_train.driver.turns import ALL_TAGS, EngineMemory, Turns
from miles_train.weight_sync.engine import EngineGoneError, RefusedError


class Side:
    """Trainers, supervisor and engines in memory; `events` says what was asked of them, in order."""

    def __init__(self, engines=1):
        self.events = []
        self.engines = [Endpoint(url=f"engine{index}") for index in range(engines)]
        self.gone, self.busy = set(), 0

    # the trainers

    def call(self, method, *arguments):
        self.events.append((method, *arguments))
        return [{"bytes": 4.0, "seconds": 0.5}, {"bytes": 2.0, "seconds": 0.5}]

    # the supervisor

    def hold(self):
        self.events.append("hold")

    def let_go(self):
        self.events.append("let go")

    def serving(self):
        return list(self.engines)

    # the engines

    def tell(self, endpoint, path, body=None):
        if endpoint.url in self.gone:
            raise EngineGoneError("no answer")
        if path == "/flush_cache" and self.busy:
            self.busy -= 1
            error = RefusedError("400 busy")
            error.status = 400
            raise error
        if "memory" in path:
            self.events.append((path.split("_")[0][1:], endpoint.url, *body["tags"]))


@pytest.fixture
def side(monkeypatch):
    side = Side()
    monkeypatch.setattr(module, "tell", side.tell)
    monkeypatch.setattr(module, "_POLL", 0.001)
    return side


def turns_of(side, memory=None, *, trainer=True, engines=True):
    turns = Turns(side, side, memory or EngineMemory(), trainer_gives_way=trainer, engines_give_way=engines)
    side.events.clear()
    return turns


def test_the_trainer_takes_its_turn_after_the_engines_and_keeps_its_weights_for_the_push(side):
    turns = turns_of(side)
    turns.to_engines(lambda: side.events.append("push"))
    turns.to_trainer()
    assert side.events == [
        ("offload", True), ("resume", "engine0", *ALL_TAGS), "let go", "push", ("offload", False),
        "hold", ("release", "engine0", *ALL_TAGS), ("onload",),
    ]  # fmt: skip


def test_engines_keep_their_weights_while_the_trainer_saves(side):
    turns = turns_of(side)
    turns.to_engines(lambda: None)
    side.events.clear()
    with turns.borrowed():
        side.events.append("save")
    assert side.events == [
        "hold", ("release", "engine0", "kv_cache"), ("onload",), "save", ("offload", False),
        ("resume", "engine0", "kv_cache"), "let go",
    ]  # fmt: skip


def test_where_nobody_gives_way_only_the_push_is_made(side):
    turns = turns_of(side, trainer=False, engines=False)
    turns.to_engines(lambda: side.events.append("push"))
    turns.to_trainer()
    with turns.borrowed():
        pass
    assert side.events == ["push"]
    assert turns.spent() == {}


def test_an_engine_that_released_before_is_not_asked_again(side):
    memory = EngineMemory()
    memory.release(side.engines, *ALL_TAGS)
    side.events.clear()
    Turns(side, side, memory, trainer_gives_way=True, engines_give_way=True)
    assert side.events == ["hold"]


def test_an_engine_that_is_gone_stops_nothing_and_the_one_in_its_place_is_not_told_to_resume(side):
    turns = turns_of(side)
    side.gone = {"engine0"}
    turns.to_engines(lambda: None)
    # At the address of the one that died.
    side.gone, side.engines = set(), [Endpoint(url="engine0")]
    turns.to_trainer()
    side.engines = [Endpoint(url="engine0")]
    side.events.clear()
    turns.to_engines(lambda: None)
    assert side.events == [("offload", True), "let go", ("offload", False)]


def test_an_engine_releases_when_it_has_ended_what_nobody_waits_for(side):
    side.busy = 3
    turns = turns_of(side)
    assert side.busy == 0
    turns.to_engines(lambda: None)
    assert ("resume", "engine0", *ALL_TAGS) in side.events


def test_an_engine_that_never_gets_idle_ends_the_run(side, monkeypatch):
    side.busy = 10**9
    monkeypatch.setattr(module, "_IDLE_WITHIN", 0.01)
    with pytest.raises(ServiceError, match="must be idle to release its memory"):
        turns_of(side)


def test_a_row_says_what_the_turns_have_cost_once(side):
    turns = turns_of(side)
    turns.to_engines(lambda: None)
    spent = turns.spent()
    assert spent["memory/trainer_bytes"] == 12.0
    assert {"memory/engines_seconds", "memory/trainer_seconds"} < spent.keys()
    assert turns.spent() == {}
