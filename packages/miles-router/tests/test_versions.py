"""Requests that ask for certain weights."""

from __future__ import annotations

import asyncio


def test_a_request_for_certain_weights_goes_to_engines_registered_with_them_only(serve, routed, engine):
    async def main():
        old, new = engine(b"old"), engine(b"new")
        async with serve(old) as a, serve(new) as b, routed() as r:
            for url, version in ((a, "4"), (b, "5")):
                await r.client.post("/workers", json={"url": url, "weight_version": version})
            for version, text in (("4", "old"), ("5", "new")):
                answers = {(await r.post(headers={"X-Miles-Weight-Version": version})).text for _ in range(4)}
                assert answers == {text}
            assert {(await r.post()).text for _ in range(4)} == {"old", "new"}
            answer = await r.post(headers={"X-Miles-Weight-Version": "6"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "no_version")
            assert answer.json()["error"]["message"].endswith(f"registered with weights 6: {a} 4, {b} 5")
            await r.client.post("/workers", json={"url": a, "weight_version": "6"})
            assert (await r.post(headers={"X-Miles-Weight-Version": "6"})).text == "old"

    asyncio.run(main())
