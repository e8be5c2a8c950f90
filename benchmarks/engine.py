"""Tokens per second: the local engine over HTTP against `transformers.generate()`, same model, prompts and lengths.

Both sample at temperature 1 on one thread; each answer has exactly --new tokens. Runs alternate, medians are compared.
With --sglang PYTHON, of an environment that `miles sglang-cpu` made, SGLang serves the same as well, and the time from
launch to the first answer is told of both engines.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api.services import Placement
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 32},
    "10M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "vocab_size": 4096},
}


def make_model(size: str, folder: Path) -> Qwen3ForCausalLM:
    """Write a random Qwen3 with a tokenizer of its vocabulary, and return it."""
    torch.manual_seed(0)
    heads = SIZES[size]["hidden_size"] // 32
    config = Qwen3Config(
        **SIZES[size], num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=32, dtype="float32",
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    vocabulary = {f"<{i}>": i for i in range(SIZES[size]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>", pad_token="<0>").save_pretrained(folder)
    return model


def generate(model: Qwen3ForCausalLM, prompts: torch.Tensor, new: int) -> float:
    """Return the seconds of one `generate()` call."""
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            top_k=0, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - started


async def over_http(url: str, prompts: torch.Tensor, new: int, times: int) -> list[float]:
    """Return the seconds of `times` bursts of one request a prompt."""

    async def one(session: aiohttp.ClientSession, ids: list[int]) -> None:
        params = {"max_new_tokens": new, "temperature": 1.0, "ignore_eos": True}
        payload = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
        async with session.post(f"{url}/generate", json=payload) as reply:
            answer = await reply.json()
            assert answer["meta_info"]["completion_tokens"] == new

    seconds = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=512)) as session:
        for _ in range(times):
            started = time.perf_counter()
            await asyncio.gather(*(one(session, ids) for ids in prompts.tolist()))
            seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--sglang", metavar="PYTHON", help="also measure SGLang, which this Python has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(size, Path(folder))
            fleet = LocalFleet(LocalEngineOptions(engine_max_total_len=options.prompt + options.new), folder, 0)
            try:
                started = time.perf_counter()
                fleet.start([Placement()])
                url = fleet.endpoints()[0].url
                asyncio.run(over_http(url, torch.tensor([[2, 3]]), 2, 1))
                print(f"{size:5} local engine: serves {time.perf_counter() - started:.1f} s after its launch")
                with sglang(options.sglang, folder, size) as theirs:
                    compare(size, model, {"engine": url, **theirs}, options)
            finally:
                fleet.stop()


@contextmanager
def sglang(python: str | None, folder: str, size: str) -> Iterator[dict[str, str]]:
    """Serve the model by SGLang, if asked to, and give its address by name."""
    if python is None:
        yield {}
        return
    options = SGLangOptions(sglang_python=python, sglang_args={"max_running_requests": 128})
    fleet, started = SGLangFleet(options, EngineFleetOptions(), folder, 0), time.perf_counter()
    try:
        fleet.start([Placement()])
        url = fleet.endpoints()[0].url
        asyncio.run(over_http(url, torch.tensor([[2, 3]]), 2, 1))
        print(f"{size:5} SGLang: serves {time.perf_counter() - started:.1f} s after its launch", flush=True)
        yield {"SGLang": url}
    finally:
        fleet.stop()


def compare(size: str, model: Qwen3ForCausalLM, urls: dict[str, str], options: argparse.Namespace) -> None:
    """Print tokens per second of all, and their ratio to `generate()`, for each batch size."""
    for batch in options.batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(2, SIZES[size]["vocab_size"], (batch, options.prompt), generator=generator)
        generate(model, prompts, 2)
        for url in urls.values():
            asyncio.run(over_http(url, prompts, 2, 1))
        seconds: dict[str, list[float]] = {"generate()": [], **{name: [] for name in urls}}
        for _ in range(options.times):
            seconds["generate()"].append(generate(model, prompts, options.new))
            for name, url in urls.items():
                seconds[name] += asyncio.run(over_http(url, prompts, options.new, 1))
        rate = {name: batch * options.new / statistics.median(each) for name, each in seconds.items()}
        told = [f"{name} {each:7.0f} tok/s ({each / rate['generate()']:.2f}×)" for name, each in rate.items()]
        print(f"{size:5} batch {batch:4}: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
