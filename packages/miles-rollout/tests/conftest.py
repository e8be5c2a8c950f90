import gc
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles_api.config import RunConfig, option_groups
from miles_api.run_options import RunOptions
from miles_api.testing.engine import apart
from miles_rollout.service import RolloutWorker

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz >"


@pytest.fixture(scope="module", autouse=True)
def what_is_frozen_stays_frozen():
    """Spare each start of a service half a second: it collects what torch and transformers have left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A directory with a character tokenizer and no model."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}>", "label": str(i)}) + "\n" for i in range(5)))
    return str(file)


@pytest.fixture
def configure(tokenizer_dir, prompt_file, tmp_path):
    """Build a RunConfig from flat option values."""

    def build(**values):
        given = {
            "hf_checkpoint": tokenizer_dir, "prompt_data": prompt_file, "label_key": "label", "rm_type": "f1",
            "rollout_batch_size": 2, "n_samples_per_prompt": 3, "run_dir": str(tmp_path / "run"), **values,
        }  # fmt: skip
        config = RunConfig({name: kind() for name, kind in option_groups().items()}, {})
        assert config.group(RunOptions)
        return config.replace("test", **given)

    return build


@pytest.fixture
def args_of(configure):
    def build(**values):
        return configure(**values).args

    return build


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address): ...  # clients that cancel hang up in the middle of an answer


class FakeEngine:
    """Answers /generate like an engine, from a function of the request; for unit tests of the loop alone.

    Of a request with several prompts, `requests` holds each, and `joint` counts it.
    """

    def __init__(self, answer):
        self.requests, self.joint = [], 0
        self.headers = {}
        self.answer = answer
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                parts = apart(payload)
                answers = [engine.one(self.path, request) for request in parts or [payload]]
                status, reply = max(answers, key=lambda answer: answer[0])
                if status == 200 and parts is not None:
                    engine.joint += 1
                    reply = [each for _, each in answers]
                body = json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **engine.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args): ...

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def one(self, path, payload):
        self.requests.append((path, payload))
        return self.answer(payload)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def reply(ids, text, *, version="1", finish="stop", log_prob=-0.5):
    meta = {
        "finish_reason": {"type": finish}, "weight_version": version, "cached_tokens": 2,
        "output_token_logprobs": [[log_prob, i, None] for i in ids],
    }  # fmt: skip
    return {"text": text, "output_ids": ids, "meta_info": meta}


@pytest.fixture
def engine_reply():
    return reply


@pytest.fixture
def fake_engine():
    engines = []

    def start(answer=lambda payload: (200, reply([5, 1], "3"))):
        engines.append(FakeEngine(answer))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def worker(configure, fake_engine):
    """Start the rollout process's worker on an engine, or on a `url` of its own; it is stopped after the test."""
    workers = []

    def start(engine=None, *, url=None, **values):
        worker = RolloutWorker(configure(**values))
        workers.append(worker)
        worker.start((engine or fake_engine()).url if url is None else url)
        return worker

    yield start
    for one in workers:
        one.stop()


@pytest.fixture
def hook(tmp_path):
    """Write a hook file and return the reference to the function in it."""

    def write(body, name="fn"):
        file = tmp_path / f"hook_{abs(hash(body))}.py"
        file.write_text(body)
        return f"{file}:{name}"

    return write
