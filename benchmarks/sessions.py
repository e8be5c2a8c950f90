"""What an agent's session costs beyond its answers: chat completions against plain `/generate` of the same ids.

    hatch run python examples/smollm2/prepare.py   # once: the tokenizer and chat template of a real model
    hatch run python benchmarks/sessions.py

Each conversation asks, is answered with `--tokens` tokens and asks again, `--turns` times; its client is aiohttp's with
one connection, in this process. The plain requests are those that the sessions sent to the engines, one after the other
in each conversation, by the client that sessions use. The engine is the local one with a tiny random model of that
vocabulary. Runs alternate, medians are compared; own milliseconds are the CPU time of this process, which for sessions
is client and endpoint together. `--profile FILE` writes what a session spends them on.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import torch
from turns import make_model

from miles_api import Sample
from miles_api.config import RunConfig, option_groups
from miles_api.loading.hookset import HookSet
from miles_api.rollout_types import GenerateFnInput
from miles_api.services import Placement
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.hook_names import CALLED_BY_LOOP
from miles_rollout.requests import Requests
from miles_rollout.tokenizers import load_tokenizer

HERE = Path(__file__).parent
QUESTION = "And what else is there to say about it? Be brief, and do not repeat what you have said before."


async def agent(
    base_url: str, prompt: list[dict[str, Any]], request_kwargs: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Ask as often as the metadata say."""
    messages = list(prompt)
    async with aiohttp.ClientSession() as client:
        for _ in range(metadata["asks"]):
            body = {"messages": messages, **request_kwargs, "max_tokens": metadata["tokens"]}
            async with client.post(f"{base_url}/chat/completions", json=body) as reply:
                answer = (await reply.json())["choices"][0]["message"]
            messages += [answer, {"role": "user", "content": QUESTION}]


class State:
    """The `GenerateState` of all sessions, which keeps their requests."""

    def __init__(self, args: Any, url: str) -> None:
        self.args, self.aborted = args, False
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.hooks = HookSet(args, CALLED_BY_LOOP)
        self.requests = Requests(url, {}, 600.0, 512)
        self.sent: list[dict[str, Any]] = []

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Send a request of a session."""
        self.sent.append(payload)
        return await self.requests.post(path, payload)

    async def session(self, number: int, options: argparse.Namespace) -> None:
        """Let one agent hold its conversation."""
        prompt = [{"role": "user", "content": f"Tell me about the number {number}."}]
        sample = Sample(index=number, group_index=number, prompt=prompt)
        sample.metadata = {"asks": options.turns, "tokens": options.tokens}
        # A random model would end its answers anywhere.
        params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 7000, "ignore_eos": True}
        request = GenerateFnInput(state=self, sample=sample, sampling_params=params)
        done = (await self.hooks.need("generate").acall(None, request)).samples
        assert done.metadata["turns"] == options.turns, done.metadata

    async def plain(self, requests: list[dict[str, Any]]) -> None:
        """Send the requests of one conversation, one after the other."""
        for request in requests:
            await self.requests.post("/generate", request)


def by_conversation(sent: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the requests of each conversation, in order: each continues the one before it."""
    ends: list[list[dict[str, Any]]] = []
    for request in sent:
        ids = request["input_ids"]
        own = next((end for end in ends if ids[: len(end[-1]["input_ids"])] == end[-1]["input_ids"]), None)
        if own is None:
            ends.append([request])
        else:
            own.append(request)
    return ends


async def measure(state: State, at_once: int, options: argparse.Namespace) -> tuple[list[tuple[float, float]], ...]:
    """Return wall and CPU seconds of runs with sessions and of plain ones, in turns."""
    state.sent.clear()
    await asyncio.gather(*(state.session(n, options) for n in range(at_once)))
    requests = by_conversation(list(state.sent))
    assert len(requests) == at_once
    runs: tuple[list[tuple[float, float]], ...] = ([], [])
    for _ in range(options.times):
        for which, make in enumerate(
            (
                lambda: [state.session(n, options) for n in range(at_once)],
                lambda: [state.plain(own) for own in requests],
            )
        ):
            wall, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*make())
            runs[which].append((time.perf_counter() - wall, time.process_time() - cpu))
    return runs


async def report(state: State, options: argparse.Namespace) -> None:
    """Print a line for each number of conversations at once."""
    print("at once | requests/s: sessions, plain, ratio | own CPU ms a request: sessions, plain, difference")
    for at_once in options.at_once:
        sessions, bare = await measure(state, at_once, options)
        count = at_once * options.turns
        rate = [count / statistics.median(run[0] for run in runs) for runs in (sessions, bare)]
        cpu = [1e3 * statistics.median(run[1] for run in runs) / count for runs in (sessions, bare)]
        print(
            f"{at_once:7} | {rate[0]:.0f} {rate[1]:.0f} {rate[0] / rate[1]:.2f} "
            f"| {cpu[0]:.2f} {cpu[1]:.2f} {cpu[0] - cpu[1]:.2f}",
            flush=True,
        )
    if options.profile:
        with cProfile.Profile() as profile:
            await asyncio.gather(*(state.session(n, options) for n in range(options.at_once[-1])))
        profile.dump_stats(options.profile)
    await state.hooks.aclose()
    await state.requests.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "examples" / "smollm2" / "data" / "model")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(options.tokenizer, Path(folder))
        config = RunConfig({name: kind() for name, kind in option_groups().items()}, {}).replace(
            "benchmark", hf_checkpoint=folder, custom_generate_function_path="agentic",
            custom_agent_function_path=f"{__file__}:agent",
        )  # fmt: skip
        fleet = LocalFleet(LocalEngineOptions(), folder, seed=0)
        fleet.start([Placement(node="here")])
        try:
            asyncio.run(report(State(config.args, fleet.endpoints()[0].url), options))
        finally:
            fleet.stop()


if __name__ == "__main__":
    main()
