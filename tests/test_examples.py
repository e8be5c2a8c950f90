"""The examples with a real model: their rewards, their model conversion, and that their runs are ready to start."""

import contextlib
import json
import re
import shutil
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_api import Status
from miles_api.checks.check import check_words
from miles_api.testing import make_sample
from tests.examples_of import load

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


smollm2 = load(EXAMPLES / "smollm2" / "reward.py")
prompts = load(EXAMPLES / "smollm2" / "prompts.py")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The old village sleeps beneath bread and snow.", 1.0),
        ("Bread, warm and old, is what the village eats.", 0.5),
        ("Bread, warm and golden, is what the village eats.", 0.0),
        ("The golden village sleeps beneath the snow.", 0.0),
        ("old bread", 0.0),
        ("", 0.0),
        ("\ufffd\u0000 ,,, \n\n", 0.0),
    ],
)
def test_an_answer_earns_the_share_of_instructions_that_it_follows(answer, score):
    checks = {"no_commas": True, "includes": "old"}
    sample = make_sample(response=answer, status=Status.COMPLETED, metadata={"topic": "bread", "checks": checks})
    assert smollm2.follow_instructions(None, sample) == score


def test_an_answer_that_was_cut_off_earns_nothing():
    metadata = {"topic": "bread", "checks": {"no_commas": True}}
    sample = make_sample(response="We eat bread in the morning", status=Status.TRUNCATED, metadata=metadata)
    assert smollm2.follow_instructions(None, sample) == 0.0


@pytest.mark.parametrize(
    ("name", "value", "good", "bad"),
    [
        ("no_commas", True, "tea and milk", "tea, milk"),
        ("max_words", 3, "tea and milk", "tea and cold milk"),
        ("includes", "old", "An OLD house.", "He told a lie."),
        ("ends_with", "?", "Who bakes bread? \n", "Who? Nobody."),
    ],
)
def test_each_check_tells_good_from_bad(name, value, good, bad):
    assert smollm2.CHECKS[name](good, value)
    assert not smollm2.CHECKS[name](bad, value)


@given(st.text())
def test_no_text_breaks_the_checks_or_earns_more_than_1(text):
    checks = {"no_commas": True, "max_words": 10, "includes": "old", "ends_with": "?"}
    assert 0.0 <= smollm2.share_followed(text, "bread", checks) <= 1.0


def test_every_instruction_has_its_check_and_held_out_topics_are_not_trained_on(tmp_path):
    prompts.write_prompts(tmp_path, seed=0)
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("train", "heldout")}
    asked = {check for lines in rows.values() for row in lines for check in row["metadata"]["checks"]}
    assert asked == set(smollm2.CHECKS)
    topics = {name: {row["metadata"]["topic"] for row in lines} for name, lines in rows.items()}
    assert topics["train"].isdisjoint(topics["heldout"])


def test_prompts_are_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prompts.write_prompts(tmp_path / name, seed=0)
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "two" / "train.jsonl").read_bytes()


def fake_verifier(monkeypatch, verdict):
    """Stand in for reasoning-gym with a task whose verifier is `verdict`; return the example's reward module."""
    module = types.ModuleType("reasoning_gym")
    module.create_dataset = lambda task, **_: types.SimpleNamespace(score_answer=verdict)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    return load(EXAMPLES / "reasoning_gym" / "reward.py")


def raises(answer, entry):
    raise ZeroDivisionError(answer)


@pytest.mark.parametrize(
    ("verdict", "answer", "score"),
    [
        (lambda answer, entry: 1.0, "12", 1.0),
        (lambda answer, entry: 0.25, "12 or so", 0.25),
        (lambda answer, entry: 1.0, " \n", 0.0),
        (lambda answer, entry: 1.0, "1" * 1000, 0.0),
        (lambda answer, entry: float("nan"), "12", 0.0),
        (lambda answer, entry: None, "12", 0.0),
        (lambda answer, entry: 7, "12", 1.0),
        (raises, "0/0", 0.0),
    ],
)
def test_whatever_a_verifier_does_an_answer_earns_between_0_and_1(monkeypatch, verdict, answer, score):
    module = fake_verifier(monkeypatch, verdict)
    sample = make_sample(response=answer, metadata={"task": "any", "entry": {}})
    assert module.verified(None, sample) == score


def test_the_verifier_of_reasoning_gym_scores_sums():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: hatch run reasoning-gym:train")
    module = load(EXAMPLES / "reasoning_gym" / "reward.py")
    entry = {"question": "8 - 12 =", "answer": "-4", "metadata": {}}
    assert [module.score(answer, "chain_sum", entry) for answer in ("-4", "-4.0", "4", "four", "-")] == [1, 1, 0, 0, 0]
    assert 0 < module.score("-4, I think", "chain_sum", entry) < 0.5


@pytest.mark.parametrize(("marks", "refused"), [(1.0, True), (0.2, False)])
def test_a_task_whose_verifier_gives_nonsense_full_marks_is_refused(monkeypatch, marks, refused):
    monkeypatch.setitem(sys.modules, "reward", fake_verifier(monkeypatch, lambda answer, entry: marks))
    prepare = load(EXAMPLES / "reasoning_gym" / "prepare.py")
    with pytest.raises(SystemExit, match="full marks on 2 of 2") if refused else contextlib.nullcontext():
        prepare.require_verifier([{}, {}])


def test_without_reasoning_gym_the_reward_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match="hatch run reasoning-gym:train"):
        load(EXAMPLES / "reasoning_gym" / "reward.py")


@pytest.fixture
def stand_in_model(quickstart_data, tmp_path):
    """The quickstart's tiny model, with a chat template."""
    folder = tmp_path / "model"
    shutil.copytree(quickstart_data / "model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_run_of_smollm2_is_ready_to_start(stand_in_model, tmp_path):
    prompts.write_prompts(tmp_path, seed=0)
    assert problems(EXAMPLES / "smollm2" / "run.toml", stand_in_model, tmp_path) == []


def test_the_run_of_reasoning_gym_is_ready_to_start(stand_in_model, tmp_path, monkeypatch):
    fake_verifier(monkeypatch, lambda answer, entry: 1.0)
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "2 + 2 =", "metadata": {"task": "any", "entry": {}}}\n')
    assert problems(EXAMPLES / "reasoning_gym" / "run.toml", stand_in_model, tmp_path) == []


def problems(run_file, model, folder):
    words = ["--hf-checkpoint", model, "--prompt-data", folder / "train.jsonl", "--run-dir", folder / "run"]
    words += ["--eval-prompt-data", folder / "heldout.jsonl"]
    # The stand-in has 64 positions; lengths are about the real model.
    words += ["--engine-max-total-len", "64"]
    return [p.message for p in check_words([str(run_file), *map(str, words)], prog="miles check").problems]


NAMES = ["smollm2", "reasoning_gym", "multi_agent", "custom_rollout"]


def expanded(scripts, name):
    """Return the command lines of a hatch script, those of the scripts that it names included."""
    lines = scripts[name] if isinstance(scripts[name], list) else [scripts[name]]
    for line in lines:
        first, _, rest = line.partition(" ")
        yield from (f"{one} {rest}" for one in expanded(scripts, first)) if first in scripts else [line]


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_an_example_exist_and_name_files_that_exist(name):
    text = (EXAMPLES / name / "README.md").read_text()
    environments = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
    commands = re.findall(r"^hatch run (?:([\w-]+):)?([\w-]+)", text, re.MULTILINE)
    assert commands
    for environment, script in commands:
        scripts = environments["default"]["scripts"] | environments[environment or "default"]["scripts"]
        files = re.findall(r"examples/[\w/]+\.(?:py|toml)", " ".join(expanded(scripts, script)))
        assert any(file.startswith(f"examples/{name}/") for file in files)
        assert [file for file in files if not (ROOT / file).is_file()] == []


def test_no_environment_counts_on_commands_that_hatch_runs_only_after_it_has_installed_a_project():
    environments = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
    assert [name for name, environment in environments.items() if "post-install-commands" in environment] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_an_example_shows_are_there(name):
    folder = EXAMPLES / name
    named = re.findall(r"\]\(([\w./-]+)\)", (folder / "README.md").read_text())
    assert [file for file in named if not (folder / file).exists()] == []


@pytest.fixture(scope="module")
def convert():
    """The example's prepare.py, where gguf is installed."""
    pytest.importorskip("gguf", reason="gguf is not installed: hatch run smollm2:train")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "smollm2")
        return load(EXAMPLES / "smollm2" / "prepare.py")


def llama_cpp_order(weight, heads):
    """Put rows of q or k in the order llama.cpp's converter writes them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokens, merges):
    """Write a Llama as llama.cpp's converter does, in fp32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = model.state_dict()
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    kinds = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        parts = name.split(".")
        kind = None if name in names else kinds[parts[-2]]
        weight = llama_cpp_order(tensor, heads[kind]) if kind in heads else tensor
        writer.add_tensor(names.get(name) or f"blk.{parts[2]}.{kind}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(convert, tmp_path_factory):
    """A tiny random Llama, and the directory that prepare.py makes of its GGUF file."""
    from tokenizers import pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "Ġhe", "42"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, dtype="float32",
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", model, tokens, ["h e", "Ġ he", "4 2"])
    convert.make_model(folder / "model", folder / "tiny.gguf")
    return model.eval(), folder / "model"


def test_a_converted_model_computes_what_the_original_does(converted):
    from transformers import AutoModelForCausalLM

    original, folder = converted
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        ours, theirs = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits, original(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_converted_tokenizer_splits_digits_keeps_its_specials_and_has_the_chat_template(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    text = "<|im_start|>he he 42é<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>", "he", "Ġhe", "Ġ", "4", "2", "Ã", "©", "<|im_end|>"
    ]  # fmt: skip
    assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token_id == 2


def test_without_the_package_of_the_model_prepare_says_how_to_get_it(convert, monkeypatch):
    monkeypatch.setattr(convert, "PACKAGE", "no-such-package-of-a-model")
    with pytest.raises(SystemExit, match="hatch run smollm2:train"):
        convert.find_gguf()
