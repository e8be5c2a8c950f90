"""Conversations without a model: a ChatML tokenizer of characters, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import string
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api.loading.hookset import HookSet
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Sample
from miles_api.services import Placement
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.hook_names import CALLED_BY_LOOP
from miles_rollout.tokenizers import load_tokenizer

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
# "42" is a token that the tokenizer itself never writes: another way to spell the same text.
TOKENS = [*SPECIAL, "42", *sorted(set(string.printable))]
TEMPLATE = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}<|im_start|>user{% endif %}
{{- "\\n<tool_response>\\n" + m.content + "\\n</tool_response>" }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}<|im_end|>
{% endif %}
{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save_tokenizer(folder, template=TEMPLATE):
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory):
    """A model directory with nothing but the tokenizer."""
    return save_tokenizer(tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def write(tmp_path):
    """Write a module of hooks; `write(text)("name")` is a reference into it."""

    def make(text):
        file = tmp_path / f"hooks_{abs(hash(text))}.py"
        file.write_text(text)
        return lambda name: f"{file}:{name}"

    return make


SOURCE = """
from miles_api.sample import Sample
class Source:
    def __init__(self, args):
        self.size = args.n_samples_per_prompt
    def get_samples(self, count):
        ask = [{"role": "user", "content": "1 + 2?"}]
        return [
            [Sample(group_index=g, index=g * self.size + i, prompt=ask, label="3") for i in range(self.size)]
            for g in range(count)
        ]
    def add_samples(self, samples): ...
    def save(self, rollout_id): ...
    def load(self, rollout_id=None): ...
"""


@pytest.fixture
def chat_source(write):
    """A data source whose prompts are chat messages."""
    return write(SOURCE)("Source")


class Bench:
    """The `GenerateState` of one hook under test, with a scripted engine behind `post`."""

    def __init__(self, args, script):
        self.args, self.script, self.requests = args, list(script), []
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.hooks = HookSet(args, CALLED_BY_LOOP)
        self.aborted = False
        self.hold = None

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def rendered(self, messages, **how):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)

    async def post(self, path, payload):
        self.requests.append((path, payload))
        if self.hold is not None:
            await self.hold.wait()
        said = self.script.pop(0)
        if isinstance(said, Exception):
            raise said
        said = said if isinstance(said, dict) else {"text": said}
        ids = said.get("ids") or self.ids(said["text"])
        finish = said.get("finish", "stop")
        if finish == "stop" and not said.get("cut"):
            ids = [*ids, self.tokenizer.eos_token_id]
        limit = payload["sampling_params"]["max_new_tokens"]
        if len(ids) > limit:
            ids, finish = ids[:limit], "length"
        meta = {
            "finish_reason": {"type": finish}, "weight_version": "1", "prompt_tokens": len(payload["input_ids"]),
            "cached_tokens": 0, "output_token_logprobs": [[-0.5, i, None] for i in ids],
        }  # fmt: skip
        return {"text": self.tokenizer.decode(ids, skip_special_tokens=True), "output_ids": ids, "meta_info": meta}

    async def generate(
        self, prompt="hi", *, evaluation=False, index=0, limit=1000, metadata=None, as_text=False, begun=None
    ):
        prompt = prompt if as_text or not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
        sample = begun or Sample(index=index, group_index=0, prompt=prompt, metadata=metadata or {})
        params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": limit, "skip_special_tokens": True}
        request = GenerateFnInput(state=self, sample=sample, sampling_params=params, evaluation=evaluation)
        output = await self.hooks.need("generate").acall(None, request)
        assert isinstance(output, GenerateFnOutput)
        for made in output.samples if isinstance(output.samples, list) else [output.samples]:
            made.validate()
        return output.samples

    def run(self, *args, **kwargs):
        """Generate one sample in an event loop of its own, and close."""

        async def main():
            try:
                return await self.generate(*args, **kwargs)
            finally:
                await self.hooks.aclose()

        return asyncio.run(main())


@pytest.fixture
def bench(args_of, chat_dir):
    """`bench(script, **options)`: the state around a generate hook, and an engine that answers by `script`."""

    def start(script=(), **values):
        return Bench(args_of(**{"hf_checkpoint": chat_dir, **values}), script)

    return start


# The agent of each test is put here; user code is a file, which finds it by importing nothing of ours.
AGENT_HOOKS = """
import asyncio
import agents_stage
async def agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    return await agents_stage.act(base_url, prompt, request_kwargs, metadata)
async def abort(args):
    agents_stage.aborted.append(args.hf_checkpoint)
"""


@pytest.fixture
def stage(monkeypatch):
    """A module whose `act` the agent hook calls."""
    module = SimpleNamespace(act=None, aborted=[], hooks=AGENT_HOOKS)
    monkeypatch.setitem(sys.modules, "agents_stage", module)
    return module


@pytest.fixture
def agents(bench, write, stage):
    """`agents(act, script)`: a bench whose agent is `act`."""

    def start(act, script=(), **values):
        stage.act = act
        given = {"custom_generate_function_path": "agentic", "custom_agent_function_path": write(AGENT_HOOKS)("agent")}
        return bench(script, **{**given, **values})

    return start


async def chat(base_url, messages, expect=200, **more):
    """Ask a session for a completion."""
    # Reading the system's certificates, which plain HTTP does not need, takes longer than all else.
    async with httpx.AsyncClient(timeout=20, trust_env=False, verify=False) as client:
        reply = await client.post(f"{base_url}/chat/completions", json={"messages": messages, **more})
    assert reply.status_code == expect, reply.text
    return reply.json()


async def said(base_url, messages, **more):
    """Ask a session and return its answer's message."""
    return (await chat(base_url, messages, **more))["choices"][0]["message"]


@pytest.fixture(scope="session")
def talk():
    """How agents of tests talk to a session."""
    return SimpleNamespace(chat=chat, said=said)


@pytest.fixture(scope="session")
def kit():
    """The template, the tokens by id, and a function that saves a tokenizer of them."""
    return SimpleNamespace(template=TEMPLATE, tokens=TOKENS, save_tokenizer=save_tokenizer)


@pytest.fixture(scope="session")
def engine(tmp_path_factory, kit):
    """A real engine with a tiny random model of this tokenizer: its directory and URL."""
    folder = tmp_path_factory.mktemp("model")
    kit.save_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(kit.tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fleet = LocalFleet(LocalEngineOptions(), str(folder), seed=0)
    fleet.start([Placement(node="here")])
    yield str(folder), fleet.endpoints()[0].url
    fleet.stop()
