"""Each key sends so many requests a second, and a client learns when to come again."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_router.middlewares.rate_limit import Buckets, RateLimit


def test_a_key_that_asks_too_often_is_told_when_to_come_again_and_others_are_served(serve, routed, engine):
    async def main():
        backend = engine()
        brought = {"rate_limit_per_second": 0.01, "rate_limit_burst": 2, "rate_limit_header": "X-Tenant"}
        async with serve(backend) as url, routed(url, middleware=[RateLimit], brought=brought) as r:
            statuses = [(await r.post(content=b"x", headers={"x-tenant": "a"})).status_code for _ in range(2)]
            refused = await r.post(content=b"x", headers={"x-tenant": "a"})
            assert ([*statuses, refused.status_code], len(backend.requests)) == ([200, 200, 429], 2)
            assert 90 <= int(refused.headers["retry-after"]) <= 100
            assert "--rate-limit-per-second allows to this x-tenant" in refused.json()["error"]["message"]
            assert (await r.post(content=b"x", headers={"x-tenant": "b"})).status_code == 200
            assert (await r.post(content=b"x")).status_code == 200
            (row,) = (await r.client.get("/hooks")).json()["hooks"]
            assert row["counts"] == {"refused": 1, "keys": 3}

    asyncio.run(main())


def test_management_and_information_are_not_limited(serve, routed, engine):
    async def main():
        brought = {"rate_limit_per_second": 0.01, "rate_limit_burst": 1}
        async with serve(engine()) as url, routed(url, middleware=[RateLimit], brought=brought) as r:
            assert [(await r.post()).status_code for _ in range(2)] == [200, 429]
            for _ in range(3):
                assert (await r.client.get("/v1/models")).status_code == 200
                assert (await r.client.post("/workers", json={"url": url})).status_code == 200

    asyncio.run(main())


@given(
    st.lists(st.tuples(st.floats(0, 3), st.sampled_from([b"a", b"b"])), max_size=60),
    st.floats(0.1, 20),
    st.integers(1, 10),
)
def test_no_key_ever_gets_more_than_burst_and_rate_allow(steps, rate, burst):
    buckets, now, granted = Buckets(rate, burst, 10), 0.0, {b"a": 0, b"b": 0}
    for pause, key in steps:
        now += pause
        wait = buckets.wait(key, now)
        granted[key] += not wait
        assert granted[key] <= burst + rate * now + 1e-6
        assert wait <= 1 / rate + 1e-6


def test_who_waits_as_long_as_told_is_served():
    buckets = Buckets(3.0, 1, 10)
    assert buckets.wait(b"a", 0.0) == 0
    wait = buckets.wait(b"a", 0.1)
    assert wait == pytest.approx(1 / 3 - 0.1)
    assert buckets.wait(b"a", 0.1 + wait + 1e-9) == 0


def test_a_long_key_takes_no_more_room_than_a_short_one():
    buckets = Buckets(0.001, 1, 10)
    for key in (b"k" * 60_000, b"k" * 60_001, b""):
        assert buckets.wait(key, 1.0) == 0
        assert buckets.wait(key, 1.0) > 0
    assert max(map(len, buckets._left)) <= 16


def test_the_table_of_keys_is_bounded_and_forgets_who_was_away_longest():
    buckets = Buckets(0.001, 1, 3)
    for name in (b"a", b"b", b"c", b"a", b"d"):
        buckets.wait(name, 1.0)
    assert len(buckets) == 3
    assert buckets.wait(b"a", 1.0) > 0  # seen a second time before `d` came, so it was `b` that went
    assert buckets.wait(b"b", 1.0) == 0
