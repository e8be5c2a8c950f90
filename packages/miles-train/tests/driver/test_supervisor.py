"""Dead engines and routers are replaced in the right order, at the side of everything else, and not for ever."""

import threading

import pytest

from miles_api.errors import ServiceError
from miles_api.services import Endpoint
from miles_train.driver import supervisor as module
from miles_train.driver.supervisor import Supervisor

TIMEOUT = 20


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.005)
    monkeypatch.setattr(module, "_PAUSE", 0.005)
    monkeypatch.setattr(module, "_GRACE", 0.05)


class World:
    """Engines, router and weights in memory; `events` says what was done to them, in order."""

    def __init__(self, engines=2):
        self.changed = threading.Condition()
        self.events, self.notes = [], []
        self.words, self.router_words = {}, ""
        self.known = []
        self.told = []
        """What the router was told of weights since it started: versions it has to require, endpoints with theirs."""
        self.started = dict.fromkeys(range(engines), 0)
        self.endpoints = [self.endpoint(index) for index in range(engines)]
        self.known += [endpoint.url for endpoint in self.endpoints]
        self.on_restart = self.on_bring = self.on_router_restart = lambda *_: None
        self.gave_up = None

    def endpoint(self, index):
        return Endpoint(url=f"engine{index}.{self.started[index]}")

    def event(self, *what):
        with self.changed:
            self.events.append(what)
            self.changed.notify_all()

    def until(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, TIMEOUT), self.events

    # the fleet

    def dead(self):
        return dict(self.words)

    def awaiting(self):
        return 0

    def kill(self, index, words="killed"):
        self.words[index] = words

    def restart(self, index):
        self.event("restart", index)
        self.on_restart(index)
        self.started[index] += 1
        self.words.pop(index, None)
        return self.endpoint(index)

    # the weights

    def replace(self, old, new):
        self.event("replace", old.url, new.url)

    def bring(self, endpoint):
        self.on_bring(endpoint)
        self.event("bring", endpoint.url)

    def give_up(self, error):
        self.gave_up = error
        self.event("give up")

    def stop(self):
        self.event("stop")


class Router:
    """The router's side of a `World`."""

    def __init__(self, world):
        self.world = world

    def dead(self):
        return self.world.router_words

    def restart(self):
        self.world.event("restart router")
        self.world.on_router_restart()
        self.world.router_words, self.world.known, self.world.told = "", [], []

    def register(self, endpoint):
        self._refuse_if_dead()
        self.world.known.append(endpoint.url)
        self.world.told.append((endpoint.url, endpoint.weight_version))
        self.world.event("register", endpoint.url)

    def unregister(self, endpoint):
        self._refuse_if_dead()
        self.world.known.remove(endpoint.url)
        self.world.event("unregister", endpoint.url)

    def require_weights(self, version):
        self._refuse_if_dead()
        self.world.told.append(version)
        self.world.event("require", version)

    def report(self):
        self._refuse_if_dead()
        return [{"hook": "router_middleware"}]

    def stop(self):
        self.world.event("stop router")

    def _refuse_if_dead(self):
        if self.world.router_words:
            raise ServiceError("the router does not answer")


@pytest.fixture
def supervised():
    """Watch a world; returns it and its supervisor, which stops after the test."""
    running = []

    def start(engines=2, max_restarts=3):
        world = World(engines)
        supervisor = Supervisor(
            world, Router(world), world.endpoints, world, max_restarts=max_restarts, note=world.notes.append
        )
        supervisor.start()
        running.append(supervisor)
        return world, supervisor

    yield start
    for supervisor in running:
        supervisor.stop()


def test_a_dead_engine_is_taken_off_restarted_given_its_weights_and_only_then_registered(supervised):
    world, supervisor = supervised()
    world.kill(1)
    world.until(lambda: ("register", "engine1.1") in world.events)
    assert world.events == [
        ("unregister", "engine1.0"), ("restart", 1), ("replace", "engine1.0", "engine1.1"), ("bring", "engine1.1"),
        ("register", "engine1.1"),
    ]  # fmt: skip
    assert world.known == ["engine0.0", "engine1.1"]
    assert supervisor.problem() is None


def test_every_replacement_is_counted_once_and_noted(supervised):
    world, supervisor = supervised()
    assert supervisor.restarts() == {}
    world.kill(0)
    world.until(lambda: ("register", "engine0.1") in world.events)
    world.router_words = "the router died"
    world.until(lambda: ("restart router",) in world.events)
    world.until(lambda: ("register", "engine0.1") in world.events[world.events.index(("restart router",)) :])
    assert supervisor.restarts() == {"engines/restarts": 1.0, "router/restarts": 1.0}
    assert supervisor.restarts() == {}
    assert "engine 0 is replaced, restart 1 of 3" in world.notes
    assert "the router died" in world.notes


def test_an_engine_that_dies_again_and_again_ends_the_run_with_its_last_words(supervised):
    world, supervisor = supervised(max_restarts=2)
    world.on_bring = lambda endpoint: world.kill(0, "KeyError: 'cache'")
    world.kill(0, "the first death")
    world.until(lambda: world.gave_up)
    assert world.gave_up is supervisor.problem()
    assert str(supervisor.problem()).startswith("engine 0 is lost: --engine-max-restarts 2 allows no further")
    assert str(supervisor.problem()).endswith("KeyError: 'cache'")
    assert [event for event in world.events if event[0] == "restart"] == [("restart", 0)] * 2
    assert "engine0.0" not in world.known


def test_without_restarts_the_first_death_ends_the_run(supervised):
    world, supervisor = supervised(max_restarts=0)
    world.kill(1, "why it died")
    world.until(lambda: world.gave_up)
    assert str(supervisor.problem()).endswith("why it died")
    assert not any(event[0] == "restart" for event in world.events)


def test_a_restart_that_fails_is_tried_again_and_its_reason_is_the_last_word(supervised):
    world, supervisor = supervised(max_restarts=2)

    def taken(index):
        raise ServiceError("engine 0 cannot listen: the port is taken")

    world.on_restart = taken
    world.kill(0)
    world.until(lambda: world.gave_up)
    assert str(supervisor.problem()).endswith("cannot listen: the port is taken")
    assert [event for event in world.events if event[0] == "restart"] == [("restart", 0)] * 2


def test_an_engine_that_lives_and_refuses_the_weights_ends_the_run_at_once(supervised):
    world, supervisor = supervised()

    def refuse(endpoint):
        raise ServiceError("it serves other weights")

    world.on_bring = refuse
    world.kill(0)
    world.until(lambda: world.gave_up)
    assert str(supervisor.problem()) == "it serves other weights"
    assert "engine0.1" not in world.known
    assert world.started[0] == 1


def test_a_death_that_shows_a_moment_after_its_connection_broke_is_still_a_death(supervised):
    world, supervisor = supervised()
    times = []

    def die_late(endpoint):
        times.append(endpoint)
        if len(times) == 1:
            threading.Timer(0.01, world.kill, (0, "killed while it loaded")).start()
            raise ServiceError("connection reset")

    world.on_bring = die_late
    world.kill(0)
    world.until(lambda: ("register", "engine0.2") in world.events)
    assert supervisor.problem() is None


def test_a_slow_start_of_one_engine_delays_neither_another_nor_the_router(supervised):
    world, _ = supervised()
    released = threading.Event()
    world.on_restart = lambda index: index == 0 and released.wait(TIMEOUT)
    world.kill(0)
    world.until(lambda: ("restart", 0) in world.events)
    world.kill(1)
    world.router_words = "the router died"
    world.until(lambda: {("register", "engine1.1"), ("restart router",)} <= set(world.events))
    assert ("bring", "engine0.1") not in world.events
    released.set()
    world.until(lambda: ("register", "engine0.1") in world.events)
    assert sorted(world.known) == ["engine0.1", "engine1.1"]


def test_a_new_router_learns_of_the_engines_that_serve_and_not_of_the_others(supervised):
    world, _ = supervised()
    released = threading.Event()
    world.on_restart = lambda index: released.wait(TIMEOUT)
    world.kill(0)
    world.until(lambda: ("restart", 0) in world.events)
    world.router_words = "the router died"
    world.until(lambda: ("register", "engine1.0") in world.events)
    assert world.known == ["engine1.0"]
    released.set()
    world.until(lambda: ("register", "engine0.1") in world.events)


def test_an_engine_that_is_ready_while_the_router_is_dead_is_registered_when_that_is_back(supervised):
    world, supervisor = supervised()
    router_may_start = threading.Event()
    world.on_router_restart = lambda: router_may_start.wait(TIMEOUT)
    world.on_bring = lambda endpoint: setattr(world, "router_words", "the router died")
    world.kill(0)
    world.until(lambda: ("restart router",) in world.events)
    router_may_start.set()
    world.until(lambda: {"engine0.1", "engine1.0"} <= set(world.known))
    assert len(world.known) == 2
    assert supervisor.problem() is None


def test_the_router_learns_which_weights_were_pushed_and_that_a_new_engine_has_them(supervised):
    world, supervisor = supervised()
    supervisor.require_weights("7")
    world.kill(0)
    world.until(lambda: ("register", "engine0.1") in world.events)
    assert world.told == ["7", ("engine0.1", "7")]


def test_a_new_router_requires_the_weights_before_it_knows_an_engine(supervised):
    world, supervisor = supervised()
    supervisor.require_weights("7")
    router_may_start = threading.Event()
    world.on_router_restart = lambda: router_may_start.wait(TIMEOUT)
    world.router_words = "the router died"
    world.until(lambda: ("restart router",) in world.events)
    router_may_start.set()
    world.until(lambda: ("register", "engine1.0") in world.events)
    assert world.told == ["7", ("engine0.0", "7"), ("engine1.0", "7")]


def test_a_push_that_ends_while_the_router_is_dead_is_told_to_the_next_one(supervised):
    world, supervisor = supervised()
    world.router_words = "the router died"
    supervisor.require_weights("8")
    world.until(lambda: "8" in world.told)
    assert supervisor.problem() is None


def test_a_router_that_cannot_be_replaced_ends_the_run(supervised):
    world, supervisor = supervised(max_restarts=1)

    def fail():
        raise ServiceError("the router ended with status 1 while starting")

    world.on_router_restart = fail
    world.router_words = "the router died"
    world.until(lambda: world.gave_up)
    assert str(supervisor.problem()).startswith("the router is lost")
    assert str(supervisor.problem()).endswith("ended with status 1 while starting")


def test_the_routers_hooks_are_asked_for_again_when_it_dies_meanwhile(supervised):
    world, supervisor = supervised()
    world.router_words = "the router died"
    assert supervisor.router_report() == [{"hook": "router_middleware"}]


def test_a_defect_of_a_service_ends_the_run_instead_of_the_thread(supervised):
    world, supervisor = supervised()
    world.on_restart = lambda index: {}["no such key"]
    world.kill(0)
    world.until(lambda: world.gave_up)
    assert "KeyError: 'no such key'" in str(supervisor.problem())


def test_a_stop_ends_replacements_under_way_and_is_no_problem(supervised):
    world, supervisor = supervised()

    def until_stopped(index):
        world.until(lambda: ("stop",) in world.events)
        raise ServiceError("the engines were stopped")

    world.on_restart = until_stopped
    world.kill(0)
    world.until(lambda: ("restart", 0) in world.events)
    supervisor.stop()
    assert supervisor.problem() is None
    assert world.events[-3:] == [("stop",), ("stop router",), ("give up",)]
    assert world.events.count(("restart", 0)) == 1


def test_while_its_memory_is_held_a_dead_engine_waits_and_starts_when_it_is_let_go(supervised):
    world, supervisor = supervised()
    supervisor.hold()
    world.kill(1)
    world.until(lambda: ("unregister", "engine1.0") in world.events)
    assert [endpoint.url for endpoint in supervisor.serving()] == ["engine0.0"]
    assert ("restart", 1) not in world.events
    supervisor.let_go()
    world.until(lambda: ("register", "engine1.1") in world.events)
    assert [endpoint.url for endpoint in supervisor.serving()] == ["engine0.0", "engine1.1"]


def test_holding_waits_for_an_engine_that_starts_already(supervised):
    world, supervisor = supervised()
    starting, ready = threading.Event(), threading.Event()
    world.on_restart = lambda index: (starting.set(), ready.wait(TIMEOUT))
    world.kill(0)
    assert starting.wait(TIMEOUT)
    held = threading.Thread(target=supervisor.hold)
    held.start()
    assert held.is_alive()
    ready.set()
    held.join(TIMEOUT)
    assert not held.is_alive()
    assert supervisor.serving()[0].url == "engine0.1"


def test_holding_does_not_wait_for_an_engine_that_waits_for_the_next_push(supervised):
    world, supervisor = supervised()
    waiting, pushed = threading.Event(), threading.Event()
    world.on_bring = lambda endpoint: (waiting.set(), pushed.wait(TIMEOUT))
    world.awaiting = lambda: int(waiting.is_set() and not pushed.is_set())
    world.kill(0)
    assert waiting.wait(TIMEOUT)
    supervisor.hold()
    # It has memory of its own by now, which it has to release like the others.
    assert supervisor.serving()[0].url == "engine0.1"
    pushed.set()
    world.until(lambda: ("register", "engine0.1") in world.events)


def test_a_run_that_ends_while_a_new_engine_waits_for_the_next_push_does_not_wait_for_it(supervised):
    world, supervisor = supervised()
    told = threading.Event()

    def wait_for_a_push(endpoint):
        assert told.wait(TIMEOUT)
        raise world.gave_up

    world.on_bring = wait_for_a_push
    real = world.give_up
    world.give_up = lambda error: (real(error), told.set())
    world.kill(0)
    world.until(lambda: any(event[0] == "replace" for event in world.events))
    stopping = threading.Thread(target=supervisor.stop, daemon=True)
    stopping.start()
    stopping.join(TIMEOUT / 2)
    assert not stopping.is_alive()
    assert supervisor.problem() is None


def test_a_rollout_ends_by_name_when_every_engine_waits_for_the_push_that_waits_for_the_rollout(supervised):
    world, supervisor = supervised()
    waiting, pushed = threading.Semaphore(0), threading.Event()
    awaiting = []
    world.on_bring = lambda endpoint: (awaiting.append(endpoint), waiting.release(), pushed.wait(TIMEOUT))
    world.awaiting = lambda: 0 if pushed.is_set() else len(awaiting)
    world.kill(0)
    assert waiting.acquire(timeout=TIMEOUT)
    assert supervisor.problem() is None
    world.kill(1)
    assert waiting.acquire(timeout=TIMEOUT)
    assert "every engine died while a rollout was made" in str(supervisor.problem())
    pushed.set()
    assert supervisor.problem() is None
