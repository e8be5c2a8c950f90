"""Which worker a policy picks, asked directly."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json

import pytest

from miles_router.affinity import ConsistentHashing, Sticky
from miles_router.policies import PowerOfTwo, Random, RouteRequest
from miles_router.prefix import PrefixAware, prompt_bytes


class _Worker:
    def __init__(self, number, outstanding=0):
        self.url = f"http://engine-{number}:1"
        self.outstanding = outstanding


def _workers(*outstanding):
    return [_Worker(number, load) for number, load in enumerate(outstanding)]


class _Members:
    """What a policy asks the registry, of workers that are all healthy."""

    def __init__(self, workers):
        self.healthy = workers
        self.urls = frozenset(worker.url for worker in workers)


def _keyed(key, header=b"x-smg-routing-key"):
    return RouteRequest([(b"host", b"h"), (header, key)], b"")


def _with(**body):
    return RouteRequest([], json.dumps(body).encode())


_PLAIN = RouteRequest([], b"")


def test_random_reaches_every_worker():
    workers, policy = _workers(0, 9, 0, 0), Random()
    assert {policy.choose(workers, _PLAIN).url for _ in range(500)} == {worker.url for worker in workers}


def test_power_of_two_never_picks_the_busiest_and_spreads_over_the_others():
    workers, policy = _workers(5, 1, 1, 1), PowerOfTwo()
    chosen = collections.Counter(policy.choose(workers, _PLAIN).url for _ in range(600))
    assert set(chosen) == {worker.url for worker in workers[1:]}
    assert policy.choose(workers[:1], _PLAIN) is workers[0]


def test_a_key_stays_with_its_worker_and_keys_are_spread():
    workers = _workers(*[0] * 8)
    policy = ConsistentHashing(_Members(workers))
    keys = [b"key-%d" % n for n in range(4000)]
    first = {key: policy.choose(workers, _keyed(key)) for key in keys}
    assert all(policy.choose(workers, _keyed(key)) is worker for key, worker in first.items())
    shares = collections.Counter(worker.url for worker in first.values())
    assert len(shares) == 8
    assert max(shares.values()) < 2 * min(shares.values())


def test_when_a_worker_goes_only_its_own_keys_move_and_they_come_back_with_it():
    workers = _workers(*[0] * 8)
    policy = ConsistentHashing(_Members(workers))
    keys = [b"key-%d" % n for n in range(2000)]
    before = {key: policy.choose(workers, _keyed(key)) for key in keys}
    rest = workers[:3] + workers[4:]
    during = {key: policy.choose(rest, _keyed(key)) for key in keys}
    assert all(during[key] is worker for key, worker in before.items() if worker is not workers[3])
    assert len({during[key].url for key, worker in before.items() if worker is workers[3]}) > 3
    assert {key: policy.choose(workers, _keyed(key)) for key in keys} == before


def test_when_a_worker_comes_keys_move_to_it_and_nowhere_else():
    workers = _workers(*[0] * 8)
    members = _Members(workers[:7])
    policy = ConsistentHashing(members)
    keys = [b"key-%d" % n for n in range(2000)]
    before = {key: policy.choose(workers[:7], _keyed(key)) for key in keys}
    members.urls = _Members(workers).urls
    moved = [key for key in keys if policy.choose(workers, _keyed(key)) is not before[key]]
    assert 0 < len(moved) < 2 * len(keys) / 8
    assert all(policy.choose(workers, _keyed(key)) is workers[7] for key in moved)


def test_workers_that_left_for_good_leave_the_ring():
    members = _Members(_workers(0, 0))
    policy = ConsistentHashing(members)
    for generation in range(5):
        workers = [_Worker(f"{generation}-{number}") for number in range(2)]
        members.urls = _Members(workers).urls
        assert policy.choose(workers, _keyed(b"k")) in workers
    assert set(policy._urls) == members.urls


def test_the_ring_is_built_once_however_the_candidates_vary():
    workers = _workers(*[0] * 40)
    policy = ConsistentHashing(_Members(workers))
    rings = set()
    for start in range(39):  # as weight versions, limits and middleware make them vary
        assert policy.choose(workers[start : start + 2], _keyed(b"k")) in workers[start : start + 2]
        rings.add(id(policy._places))
    assert len(rings) == 1


@pytest.mark.parametrize("policy", [ConsistentHashing(_Members([])), Sticky(_Members([])), PrefixAware()])
def test_a_request_without_a_key_or_a_prompt_goes_to_the_idlest(policy):
    workers = _workers(3, 0, 2)
    assert policy.choose(workers, RouteRequest([], b'{"rid": "x"}')) is workers[1]


@pytest.mark.parametrize("header", [b"x-smg-routing-key", b"x-session-id"])
def test_a_session_stays_where_it_began_until_that_worker_is_gone(header):
    workers = _workers(3, 0, 2)
    members = _Members(workers)
    policy = Sticky(members)
    assert policy.choose(workers, _keyed(b"s", header)) is workers[1]
    workers[1].outstanding = 50
    assert policy.choose(workers, _keyed(b"s", header)) is workers[1]
    members.healthy = [workers[0], workers[2]]
    assert policy.choose([workers[0], workers[2]], _keyed(b"s", header)) is workers[2]
    assert policy.choose(workers, _keyed(b"s", header)) is workers[2]


def test_a_session_whose_worker_is_full_for_a_moment_comes_back_to_it():
    workers = _workers(0, 1)
    policy = Sticky(_Members(workers))
    assert policy.choose(workers, _keyed(b"s")) is workers[0]
    assert policy.choose(workers[1:], _keyed(b"s")) is workers[1]
    workers[0].outstanding = 9
    assert policy.choose(workers, _keyed(b"s")) is workers[0]


def test_a_session_costs_the_same_memory_however_long_its_name():
    workers = _workers(0, 0)
    policy = Sticky(_Members(workers))
    policy.choose(workers, _keyed(b"k" * 60_000))
    assert [len(key) for key in policy._url_of] == [16]


def test_the_sessions_that_are_longest_unused_are_forgotten_first():
    workers = _workers(0, 0)
    policy = Sticky(_Members(workers), max_sessions=3)
    homes = {key: policy.choose(workers, _keyed(key)) for key in (b"a", b"b", b"c")}
    policy.choose(workers, _keyed(b"a"))
    policy.choose(workers, _keyed(b"d"))
    assert len(policy._url_of) == 3
    homes[b"a"].outstanding = 9
    assert policy.choose(workers, _keyed(b"a")) is homes[b"a"]


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"text": "say \\"hi\\" \\\\", "rid": "r"}', b'say \\"hi\\" \\\\'),
        (b'{"sampling_params": {"stop": "\\"text\\": \\"no\\""}, "text" :"yes"}', b"yes"),
        (b'{"input_ids":[1, 22,3], "text": "no"}', b"1, 22,3"),
        (b'{"text": "never ends', b"never ends"),
        (b'{"messages": [{"content": "a]b"}]}', b'{"content": "a]b"}]}'),
        (b'{"model": "text"}', b""),
        (b"", b""),
        (b"\xff\x00", b""),
    ],
)
def test_the_prompt_is_found_without_decoding(body, prompt):
    assert prompt_bytes(body) == prompt


def test_of_a_long_prompt_only_the_beginning_is_looked_at():
    assert len(prompt_bytes(b'{"text": "%s"}' % (b"x" * 10_000_000))) == 65536


@pytest.mark.parametrize(
    "make",
    [
        lambda n, turn: _with(text=f"{n}" * 2000 + "x" * turn, sampling_params={"sampling_seed": turn}),
        lambda n, turn: _with(input_ids=[n] * 900 + [7] * turn),
        lambda n, turn: _with(model="m", messages=[{"role": "user", "content": f"{n}" * 900}] * (turn + 1)),
    ],
    ids=["text", "input_ids", "messages"],
)
def test_a_conversation_that_grows_stays_with_the_worker_that_has_its_beginning(make):
    workers, policy = _workers(0, 0, 0, 0), PrefixAware()
    homes = {n: policy.choose(workers, make(n, 0)) for n in range(8)}
    assert len({home.url for home in homes.values()}) == 4
    for turn in range(1, 4):
        assert all(policy.choose(workers, make(n, turn)) is home for n, home in homes.items())


def test_a_short_prompt_and_its_repetitions_go_to_one_worker():
    workers, policy = _workers(0, 0, 0), PrefixAware()
    assert len({policy.choose(workers, _with(text="2+2?", rid=str(n))).url for n in range(8)}) == 1


def test_prompts_that_share_less_than_a_third_are_not_kept_together():
    workers, policy = _workers(0, 0, 0), PrefixAware()
    system = "s" * 512
    homes = [policy.choose(workers, _with(text=system + f"{n}" * 4096)).url for n in range(3)]
    assert len(set(homes)) == 3


def test_a_busy_worker_hands_the_prefix_over_and_then_either_has_it():
    workers, policy = _workers(0, 0), PrefixAware()
    home = policy.choose(workers, _with(text="p" * 5000))
    other = workers[1 - workers.index(home)]
    home.outstanding = 40
    assert policy.choose(workers, _with(text="p" * 5000)) is other
    home.outstanding, other.outstanding = 2, 1
    assert policy.choose(workers, _with(text="p" * 5000)) is other
    home.outstanding, other.outstanding = 1, 2
    assert policy.choose(workers, _with(text="p" * 5000)) is home


def test_a_worker_that_is_gone_is_not_preferred():
    workers, policy = _workers(0, 0, 0), PrefixAware()
    home = policy.choose(workers, _with(text="p" * 5000))
    rest = [worker for worker in workers if worker is not home]
    assert policy.choose(rest, _with(text="p" * 5000)) in rest


def test_the_table_of_prefixes_is_bounded_and_forgets_the_oldest():
    workers, policy = _workers(0, 0), PrefixAware(max_blocks=100)
    for n in range(200):
        policy.choose(workers, _with(text=f"{n} " * 600))
    assert len(policy._holders) <= 100
    last = policy._holding([*policy._holders][-1:], workers)
    assert len(last) == 1


def test_a_routing_key_leads_through_the_router_to_one_engine(serve, routed, engine):
    async def main():
        engines = [engine(), engine(), engine()]
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(serve(e)) for e in engines]
            async with routed(*urls, router_policy="consistent_hashing") as r:
                for _ in range(6):
                    await r.post(headers={"X-SMG-Routing-Key": "group-7"})
        assert sorted(len(e.requests) for e in engines) == [0, 0, 6]

    asyncio.run(main())


def test_a_prompt_leads_through_the_router_to_the_engine_that_had_it(serve, routed, engine):
    async def main():
        engines = [engine(), engine()]
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(serve(e)) for e in engines]
            async with routed(*urls, router_policy="prefix_aware") as r:
                for n in range(6):
                    await r.post(json={"text": f"{n % 2} and a long question", "sampling_params": {"n": n}})
        prompts = [{json.loads(body)["text"] for _, body in e.requests} for e in engines]
        assert [len(found) for found in prompts] == [1, 1]

    asyncio.run(main())
