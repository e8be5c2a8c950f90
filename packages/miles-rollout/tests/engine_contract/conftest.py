"""Engines that the contract is put to, and what was said to them.

The local engine always; SGLang when `MILES_SGLANG_PYTHON` names the Python of an environment that has it (`miles
sglang-cpu` makes one), or `MILES_SGLANG_URL` a server that already serves a model this file made. With
`MILES_SGLANG_RECORD=1` what SGLang answers replaces `sglang_exchanges.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api.services import Placement
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions

HERE = Path(__file__).parent
CHARACTERS = "0123456789> abcdefghijklmnopqrstuvwxyz"
VOCABULARY = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
LONGEST = 2048
KEY = "of-the-contract"
"""What the engines of these tests ask for; a server at `MILES_SGLANG_URL` may ask for it or for none."""
_START_SECONDS = 300
_VOLATILE = frozenset({"e2e_latency", "response_sent_to_client_ts", "queue_time", "embedding"})
"""Of a recorded answer these are left out: they differ each time, or are long and not ours to know."""


def build(directory: Path, seed: int) -> Path:
    """Write a tiny Qwen3 whose choices are clear, with a tokenizer of characters."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LONGEST,
        "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)
    return directory


class Models:
    """Two models of one shape, `0` and `1`, on disk and as transformers runs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded = {}

    def path(self, which: int) -> str:
        directory = self.root / str(which)
        return str(directory if directory.is_dir() else build(directory, which))

    def reference(self, which: int):
        if which not in self._loaded:
            self._loaded[which] = AutoModelForCausalLM.from_pretrained(self.path(which), dtype=torch.float32).eval()
        return self._loaded[which]

    def log_probs(self, ids: list[int], start: int, temperature: float = 1.0, which: int = 0) -> list[float]:
        """Return the log-probs of `ids` from position `start` on."""
        with torch.inference_mode():
            logits = self.reference(which)(torch.tensor([ids[:-1]])).logits[0, start - 1 :] / temperature
        wanted = torch.tensor(ids[start:])
        return logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].tolist()

    def greedy(self, ids: list[int], count: int, which: int = 0) -> list[int]:
        """Return `count` most likely tokens, whatever they are."""
        ids = list(ids)
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(self.reference(which)(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[-count:]


class Wire:
    """One engine's HTTP; keeps what is said by `ask`."""

    def __init__(self, kind: str, url: str, models: Models) -> None:
        self.kind, self.models, self.key = kind, models, KEY
        self.client = httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {KEY}"})
        self.said: list[dict] = []

    def ask(self, path: str, body: dict | None = None, *, method: str = "POST") -> httpx.Response:
        """Send one request by itself and keep it with its answer."""
        answer = self.client.request(method, path, json=body)
        self.said.append(self._kept(method, path, body, answer))
        return answer

    def generate(self, **body):
        """Return what `/generate` answers, which is 200."""
        answer = self.ask("/generate", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @contextlib.contextmanager
    def stream(self, **body):
        """Start a request and give its events as they come."""
        with self.client.stream("POST", "/generate", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            yield (line.removeprefix("data: ") for line in answer.iter_lines() if line)

    def _kept(self, method: str, path: str, body: dict | None, answer: httpx.Response) -> dict:
        try:
            said = _steady(answer.json())
        except ValueError:
            said = answer.text
        text = json.dumps({"method": method, "path": path, "body": body, "status": answer.status_code, "answer": said})
        return json.loads(text.replace(str(self.models.root), "MODELS"))


def _steady(value):
    if isinstance(value, dict):
        return {name: _steady(each) for name, each in value.items() if name not in _VOLATILE}
    return [_steady(each) for each in value] if isinstance(value, list) else value


@pytest.fixture
def last_event():
    """Read a stream to its end and return the last reply in it."""

    def read(events) -> dict:
        *_, last, done = list(events)
        assert done == "[DONE]"
        return json.loads(last)

    return read


@contextlib.contextmanager
def _served(kind: str, models: Models):
    os.environ["CONTRACT_KEY"] = KEY
    addresses = EngineFleetOptions(engine_start_timeout=_START_SECONDS, engine_key_variable="CONTRACT_KEY")
    if kind == "local":
        fleet = LocalFleet(LocalEngineOptions(), models.path(0), seed=0, addresses=addresses)
    else:
        options = SGLangOptions(sglang_python=os.environ["MILES_SGLANG_PYTHON"])
        fleet = SGLangFleet(options, addresses, models.path(0), seed=0)
    fleet.start([Placement(node="here")])
    try:
        yield fleet.endpoints()[0].url
    finally:
        fleet.stop()


_KINDS = ["local", *(["sglang"] if {"MILES_SGLANG_PYTHON", "MILES_SGLANG_URL"} & os.environ.keys() else [])]


@pytest.fixture(scope="session", params=_KINDS)
def wire(request, tmp_path_factory):
    """Each engine in turn, on the first model."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp(request.param)
    with contextlib.ExitStack() as stack:
        given = os.environ.get("MILES_SGLANG_URL") if request.param == "sglang" else None
        if given:
            root = Path(
                httpx.get(f"{given}/model_info", headers={"authorization": f"Bearer {KEY}"}).json()["model_path"]
            ).parent
        models = Models(root)
        url = given or stack.enter_context(_served(request.param, models))
        wire = Wire(request.param, url, models)
        yield wire
    if wire.kind == "sglang" and os.environ.get("MILES_SGLANG_RECORD"):
        (HERE / "sglang_exchanges.json").write_text("[\n" + ",\n".join(map(json.dumps, wire.said)) + "\n]\n")


@pytest.fixture(autouse=True)
def first_weights(request):
    """Give the engine back as it was."""
    if "wire" not in request.fixturenames:
        yield
        return
    wire = request.getfixturevalue("wire")
    yield
    wire.client.post("/continue_generation", json={})
    wire.client.post("/abort_request", json={"abort_all": True})
    if wire.client.get("/model_info").json()["weight_version"] != "default":
        update = {"model_path": wire.models.path(0), "weight_version": "default"}
        assert wire.ask("/update_weights_from_disk", update).status_code == 200
