"""What a turn with a tool costs beyond its answer: `multi_turn` against plain `/generate` requests for the same ids.

    hatch run smollm2:model                # once: the tokenizer and chat template of a real model
    hatch run python benchmarks/turns.py

The engine is the local one with a tiny random model of that vocabulary. A random model calls no tool, so each of its
answers is replaced by one of as many tokens that does; the tool returns at once. The plain requests are those that
`multi_turn` sent, one after the other in each conversation, by the same client. Runs alternate, medians are compared;
own milliseconds are the CPU time of this process, which is neither engine nor router.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

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
SPECS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a", "b"]}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


async def add(name: str, params: dict[str, Any]) -> str:  # noqa: ARG001
    """Be a tool that costs nothing."""
    return str(params["a"] + params["b"]) + " is the sum that you asked for"


def make_model(tokenizer: Path, folder: Path) -> None:
    """Write a tiny random model with the given tokenizer."""
    vocabulary = json.loads((tokenizer / "config.json").read_bytes())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=8192, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in [*tokenizer.glob("tokenizer*"), *tokenizer.glob("*.jinja")]:
        shutil.copy(file, folder)


class State:
    """What conversations share whose every answer but the last calls a tool."""

    def __init__(self, args: Any, url: str, turns: int) -> None:
        self.args, self.turns = args, turns
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.hooks = HookSet(args, CALLED_BY_LOOP)
        self.requests = Requests(url, {}, 600.0, 512)
        eos = self.tokenizer.eos_token_id
        self._says = [
            [*self.tokenizer.encode(text, add_special_tokens=False), eos] for text in (f"I add.\n{CALL}", "It is 3.")
        ]

    async def answer(self, payload: dict[str, Any], *, last: bool) -> dict[str, Any]:
        """Send a request, and put what is said in place of the answer."""
        said = self._says[last]
        params = {**payload["sampling_params"], "max_new_tokens": len(said), "ignore_eos": True}
        reply = await self.requests.post("/generate", {**payload, "sampling_params": params})
        entries = [[entry[0], token, None] for entry, token in zip(
            reply["meta_info"]["output_token_logprobs"], said, strict=True)]  # fmt: skip
        meta = {**reply["meta_info"], "output_token_logprobs": entries, "finish_reason": {"type": "stop"}}
        return {**reply, "output_ids": said, "meta_info": meta}


class Conversation:
    """The `GenerateState` of one conversation, which knows its last turn and keeps its requests."""

    def __init__(self, state: State) -> None:
        self.args, self.tokenizer, self.hooks, self.aborted = state.args, state.tokenizer, state.hooks, False
        self._state = state
        self.sent: list[dict[str, Any]] = []

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one turn."""
        assert path == "/generate"
        self.sent.append(payload)
        return await self._state.answer(payload, last=len(self.sent) == self._state.turns)


async def with_tools(state: State, number: int) -> list[dict[str, Any]]:
    """Hold one conversation and return its requests."""
    one = Conversation(state)
    prompt = [{"role": "user", "content": f"What is 1 + 2, for the {number}th time?"}]
    sample = Sample(index=number, group_index=number, prompt=prompt)
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 7000}
    hook = state.hooks.need("generate")
    done = await hook.acall(None, GenerateFnInput(state=one, sample=sample, sampling_params=params))
    assert done.samples.metadata["tool_calls"] == state.turns - 1, done.samples.metadata
    return one.sent


async def plain(state: State, requests: list[dict[str, Any]]) -> None:
    """Send the same requests, one after the other."""
    for request in requests:
        await state.answer(request, last=request is requests[-1])


async def measure(state: State, conversations: int, times: int) -> tuple[list[tuple[float, float]], ...]:
    """Return wall and CPU seconds of runs with tools and of plain ones, in turns."""
    sent = await asyncio.gather(*(with_tools(state, n) for n in range(conversations)))
    runs: tuple[list[tuple[float, float]], ...] = ([], [])
    for _ in range(times):
        for which, make in enumerate(
            (
                lambda: [with_tools(state, n) for n in range(conversations)],
                lambda: [plain(state, requests) for requests in sent],
            )
        ):
            wall, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*make())
            runs[which].append((time.perf_counter() - wall, time.process_time() - cpu))
    return runs


async def report(state: State, options: argparse.Namespace) -> None:
    """Print a line for each number of conversations at once."""
    print("at once | ms a turn: tools, plain, ratio | own CPU ms a turn: tools, plain, difference")
    for conversations in options.at_once:
        tools, bare = await measure(state, conversations, options.times)
        turns = conversations * options.turns
        wall, cpu = (
            [1e3 * statistics.median(run[i] for run in runs) / turns for runs in (tools, bare)] for i in (0, 1)
        )
        print(
            f"{conversations:7} | {wall[0]:.2f} {wall[1]:.2f} {wall[0] / wall[1]:.2f} "
            f"| {cpu[0]:.2f} {cpu[1]:.2f} {cpu[0] - cpu[1]:.2f}",
            flush=True,
        )
    await state.requests.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "examples" / "smollm2" / "data" / "model")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 8, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(options.tokenizer, Path(folder))
        config = RunConfig({name: kind() for name, kind in option_groups().items()}, {}).replace(
            "benchmark", hf_checkpoint=folder, custom_generate_function_path="multi_turn",
            generate_execute_tool_function_path=f"{__file__}:add", generate_tool_specs_path=f"{__file__}:SPECS",
            generate_tool_call_parser="hermes", generate_max_turns=options.turns,
        )  # fmt: skip
        fleet = LocalFleet(LocalEngineOptions(), folder, seed=0)
        fleet.start([Placement(node="here")])
        try:
            asyncio.run(report(State(config.args, fleet.endpoints()[0].url, options.turns), options))
        finally:
            fleet.stop()


if __name__ == "__main__":
    main()
