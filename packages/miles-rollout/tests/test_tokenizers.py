"""Prompts become ids without transformers where that gives the same ids."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from miles_api.errors import DataError
from miles_api.loading.hookset import HookSet
from miles_rollout.plain_tokenizer import PlainTokenizer
from miles_rollout.state import State
from miles_rollout.tokenizers import load_prompt_tokenizer, load_tokenizer

TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n"
    "{%- if not thinking -%}<think></think>{%- endif -%}{%- endif -%}"
)
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<call>",
    " <call>x",
    "<mask> ",
    "\n\n",
    "  ",
    "déjà 你好",
    "don't",
    "🙂",
    "\u200d",
]

# Whatever class the files name, transformers takes one of its own.
CORRECTED_FAMILIES = sorted(
    family
    for family in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    if tokenization_auto.TOKENIZER_MAPPING_NAMES.get(family) != "TokenizersBackend"
)


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory):
    """A byte-level BPE like those of real models: special and other added tokens, a template, no class of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|im_end|>"])
    tokenizer.train_from_iterator(
        ["sort the digits of the number, don't ask why", "the number of digits"] * 20, trainer
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    whole.add_tokens([AddedToken("<call>", special=False), AddedToken("<mask>", lstrip=True, special=False)])
    whole.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("bpe")
    whole.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def variant(bpe_dir, tmp_path):
    """Return a function that copies the byte-level BPE, with changes to its JSON files; None removes an entry."""

    def make(**changes):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes(Path(bpe_dir, name).read_bytes())
        for name, changed in changes.items():
            file = tmp_path / f"{name}.json"
            before = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({k: v for k, v in (before | changed).items() if v is not None}))
        return str(tmp_path)

    return make


@pytest.fixture(params=["characters", "bpe"])
def both(request, tokenizer_dir, bpe_dir):
    """The tokenizer for prompts and the same one of transformers."""
    folder = tokenizer_dir if request.param == "characters" else bpe_dir
    return load_prompt_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(st.text(max_size=6), st.sampled_from(PIECES)), max_size=8), special=st.booleans())
def test_text_becomes_the_same_ids_as_with_transformers(both, parts, special):
    ours, theirs = both
    assert isinstance(ours, PlainTokenizer)
    text = "".join(parts)
    assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
    assert ours.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize(
    "more", [{}, {"thinking": True}, {"continue_final_message": True, "add_generation_prompt": False}]
)
def test_messages_become_the_same_text_as_with_transformers(bpe_dir, more):
    messages = [{"role": "user", "content": "sort 31"}, {"role": "assistant", "content": "13"}]
    how = {"tools": None, "tokenize": False, "add_generation_prompt": True, **more}
    ours, theirs = load_prompt_tokenizer(bpe_dir), AutoTokenizer.from_pretrained(bpe_dir)
    assert ours.apply_chat_template(messages, **how) == theirs.apply_chat_template(messages, **how)


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer_class": "GPT2Tokenizer"},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
        {"pad_token": "<|pad|>"},
        {"extra_special_tokens": ["<call>"]},
        # What the model's family then decides: the class.
        {"tokenizer_class": None},
        # As in the backend but for the blanks that it takes along.
        {"added_tokens_decoder": {"1": {"content": "<|im_end|>", "lstrip": True, "special": True}}},
    ],
)
def test_a_tokenizer_whose_files_do_not_say_all_is_loaded_by_transformers(variant, changed):
    assert isinstance(load_prompt_tokenizer(variant(tokenizer_config=changed)), PreTrainedTokenizerBase)


@pytest.mark.parametrize(
    "more",
    [
        {"special_tokens_map": {"eos_token": "<|end|>"}},
        {"added_tokens": {"<new>": 500}},
        *({"config": {"model_type": family}} for family in CORRECTED_FAMILIES),
    ],
)
def test_files_beside_the_tokenizers_own_that_change_it_are_left_to_transformers(variant, more):
    assert isinstance(load_prompt_tokenizer(variant(**more)), PreTrainedTokenizerBase)


def test_a_family_that_transformers_leaves_alone_needs_no_transformers(variant):
    folder = variant(config={"model_type": "qwen3"})
    assert isinstance(load_prompt_tokenizer(folder), PlainTokenizer)
    text = "déjà e\u0301 42 <|im_end|> x"
    ours, theirs = load_prompt_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)


def test_a_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load_prompt_tokenizer(str(tmp_path))


def test_our_own_generation_starts_without_transformers(configure, tmp_path):
    (tmp_path / "config").write_bytes(pickle.dumps(configure(rm_type="f1", apply_chat_template=False)))
    script = (
        "import pathlib, pickle, sys\n"
        "from miles_rollout.service import RolloutWorker\n"
        "config = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "RolloutWorker(config).start('http://127.0.0.1:1')\n"
        "print([name for name in ('transformers', 'torch') if name in sys.modules])\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "config")]
    assert subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"


def test_hooks_get_the_tokenizer_of_transformers_and_those_that_generate_at_once(args_of, hook, tokenizer_dir):
    args = args_of()
    args.sglang_router_ip, args.sglang_router_port = "127.0.0.1", 1
    assert State(args, HookSet(args, [])).tokenizer is load_tokenizer(tokenizer_dir)
    given_state = hook("async def fn(input):\n    return input.sample\n")
    args.custom_generate_function_path = given_state
    assert vars(State(args, HookSet(args, ["generate"])))["tokenizer"] is load_tokenizer(tokenizer_dir)
