"""Search-R1 against a real engine: what is recorded is what the model was given and what it generated."""

import asyncio
import importlib.util
import json
from pathlib import Path

import aiohttp
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api import GenerateFnInput, Sample, Status
from miles_api.services import Placement
from miles_api.testing import hook_args
from miles_hooks_contrib.search_r1 import SearchR1
from miles_hooks_contrib.search_r1.tags import CORRECTION
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions

pytest.importorskip("bm25s")

# Closing tags in the middle of a token, in halves, and as tokens of their own: a random model draws them all the time.
PIECES = ["<search> moon", "<search>", " sun", "</sea", "rch>\n", "rch> sun", "</search> sun", "<answer> so</answer>\n"]
CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:()<>/\n") | set(CORRECTION))
LIMIT = 800


def save_model(folder):
    """A random model whose tokens are pieces of tags first; text is tokenised by characters."""
    tokens = ["<pad>", "<eos>", "<unk>", *PIECES, *(c for c in CHARACTERS if c not in PIECES)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False,
        initializer_range=0.15, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # one dimension is large in all that it reads, and raises the pieces above the characters
        model.model.embed_tokens.weight[:, 0] = 8.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[3 : 3 + len(PIECES), 0] = 1.5
    model.save_pretrained(folder)


def turn_ends(sample):
    """Return the last two ids of each turn that was answered."""
    response = sample.tokens[-sample.response_length :]
    starts = [i for i in range(2, len(response)) if sample.loss_mask[i - 2 : i + 1] == [1, 1, 0]]
    return [(response[i - 2], response[i - 1]) for i in starts]


class Served:
    """The `GenerateState` of a rollout with one engine."""

    def __init__(self, args, url, tokenizer, session):
        self.args, self.url, self.tokenizer, self.session = args, url, tokenizer, session
        self.aborted, self.sent = False, []

    async def post(self, path, payload):
        self.sent.append(list(payload["input_ids"]))
        async with self.session.post(self.url + path, json=payload) as reply:
            assert reply.status == 200, await reply.text()
            return await reply.json()


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Conversations with a real engine and a real index: tokenizer, model, and each sample with what was sent."""
    folder = tmp_path_factory.mktemp("search_r1")
    save_model(folder)
    lines = [{"title": "Moon", "text": "made of cheese"}, {"title": "Sun", "text": "hot"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    args = hook_args(SearchR1, search_corpus=str(folder / "corpus.jsonl"), search_turn_len=40, search_max_turns=3)
    fleet = LocalFleet(LocalEngineOptions(), str(folder), seed=0)
    fleet.start([Placement(node="here")])

    async def main(url):
        hook = SearchR1(args)
        async with aiohttp.ClientSession() as session:
            states = [Served(args, url, tokenizer, session) for _ in range(64)]
            params = {"temperature": 1.0, "max_new_tokens": LIMIT}
            inputs = [
                GenerateFnInput(state=state, sample=Sample(index=i, prompt="moon or sun"), sampling_params=dict(params))
                for i, state in enumerate(states)
            ]
            outputs = await asyncio.gather(*map(hook, inputs))
        await hook.aclose()
        return [(output.samples, state.sent) for output, state in zip(outputs, states, strict=True)]

    try:
        pairs = asyncio.run(main(fleet.endpoints()[0].url))
    finally:
        fleet.stop()
    return tokenizer, Qwen3ForCausalLM.from_pretrained(folder).eval(), pairs


def test_conversations_of_every_kind_are_held_and_each_request_continues_the_one_before(held):
    _, _, pairs = held
    for sample, sent in pairs:
        sample.validate()
        for before, after in zip(sent, [*sent[1:], sample.tokens], strict=True):
            assert after[: len(before)] == before
    samples = [sample for sample, _ in pairs]
    assert sum(sample.metadata["tool_calls"] for sample in samples) > 20
    assert sum(sample.metadata["malformed_tool_calls"] for sample in samples) > 20
    assert {sample.status for sample in samples} == {Status.COMPLETED, Status.TRUNCATED}
    ends = {end for sample in samples for end in turn_ends(sample)}
    first, second, longer = (PIECES.index(piece) + 3 for piece in ("</sea", "rch> sun", "</search> sun"))
    assert (first, second) in ends, "no closing tag came in two tokens, the second with more than its end"
    assert longer in {last for _, last in ends}, "no token held a closing tag and more"


def test_the_log_probs_are_the_models_own_for_exactly_the_ids_that_are_recorded(held):
    _, model, pairs = held
    for sample, _ in pairs:
        ids, length = torch.tensor([sample.tokens]), sample.response_length
        with torch.no_grad():
            expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-length:, 0]
        mask = torch.tensor(sample.loss_mask, dtype=torch.bool)
        recorded = torch.tensor(sample.rollout_log_probs)
        torch.testing.assert_close(recorded[mask], expected[mask], atol=1e-4, rtol=0)
        assert not recorded[~mask].any()


def test_what_is_left_out_of_the_loss_is_what_the_model_was_shown_and_nothing_else(held):
    tokenizer, _, pairs = held
    for sample, _ in pairs:
        response = sample.tokens[-sample.response_length :]
        shown = tokenizer.decode([token for token, m in zip(response, sample.loss_mask, strict=True) if not m])
        said = tokenizer.decode([token for token, m in zip(response, sample.loss_mask, strict=True) if m])
        # What was found last may have had no room.
        assert 0 <= sample.metadata["tool_calls"] - shown.count("<information>") <= (sample.status is Status.TRUNCATED)
        assert shown.count(CORRECTION) <= sample.metadata["malformed_tool_calls"]
        assert "information" not in said
        assert sample.metadata["observation_tokens"] == sample.loss_mask.count(0)


def test_the_recipe_and_its_data_are_ready_to_train(tmp_path):
    from miles_api.checks.check import check_words

    recipes = Path(__file__).parent.parent / "packages" / "miles-hooks-contrib" / "recipes"
    spec = importlib.util.spec_from_file_location("search_r1_prepare", recipes / "search_r1" / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.main(["--out", str(tmp_path), "--no-warm-up"])
    questions = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout")}
    assert not set(questions["train"]) & set(questions["heldout"])
    paths = {
        "hf-checkpoint": tmp_path / "model", "prompt-data": tmp_path / "train.jsonl",
        "eval-prompt-data": tmp_path / "heldout.jsonl", "search-corpus": tmp_path / "corpus.jsonl",
        "run-dir": tmp_path / "run",
    }  # fmt: skip
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    report = check_words([str(recipes / "search_r1.toml"), *flags], prog="miles train")
    assert [problem.message for problem in report.problems] == []
