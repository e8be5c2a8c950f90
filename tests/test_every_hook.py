"""Two runs of the whole stack in which every hook of the table is configured, fires, and changes what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from miles_api.hooks import REGISTRY

HERE = Path(__file__).parent / "every_hook"
TOOL_CALL = '<tool_call>{"name": "look", "arguments": {"key": "a"}}</tool_call>'
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = """
[run]
num_rollout = 2
rollout_batch_size = 3
n_samples_per_prompt = 3
num_steps_per_rollout = 3
eval_interval = 1
rollout_temperature = 1.0
[data]
apply_chat_template = false
[rollout]
rollout_max_response_len = 12
[local_engine]
engine_max_total_len = 256
[optimizer]
lr = 1e-3
"""


def reference(file, name):
    return f"{HERE / file}.py:{name}"


EVERYWHERE = {
    "rollout_function_path": ("rollout_side", "Rollout"),
    "eval_function_path": ("rollout_side", "eval_rollout"),
    "data_source_path": ("rollout_side", "Source"),
    "custom_eval_rollout_log_function_path": ("rollout_side", "eval_rollout_log"),
    "custom_megatron_post_save_hook_path": ("train_side", "post_save"),
    "miles_router_middleware_paths": ("services", "Middleware"),
}
POLICY_RUN = {
    **EVERYWHERE,
    "buffer_filter_path": ("rollout_side", "buffer_filter"),
    "custom_rm_path": ("rollout_side", "reward"),
    "custom_reward_post_process_path": ("rollout_side", "reward_post_process"),
    "dynamic_sampling_filter_path": [("rollout_side", "first_filter"), ("rollout_side", "second_filter")],
    "rollout_sample_filter_path": ("rollout_side", "sample_filter"),
    "rollout_all_samples_process_path": ("rollout_side", "all_samples_process"),
    "custom_convert_samples_to_train_data_path": ("rollout_side", "convert"),
    "custom_rollout_log_function_path": ("rollout_side", "rollout_log"),
    "generate_execute_tool_function_path": ("services", "execute_tool"),
    "generate_tool_specs_path": ("services", "tools"),
    "custom_generate_function_path": "multi_turn",
    "rollout_data_postprocess_path": ("train_side", "postprocess"),
    "custom_advantage_function_path": ("train_side", "advantage"),
    "custom_tis_function_path": ("train_side", "importance_weights"),
    "custom_pg_loss_reducer_function_path": ("train_side", "reducer"),
    "custom_megatron_init_path": ("train_side", "megatron_init"),
    "custom_megatron_before_log_prob_hook_path": ("train_side", "before_log_prob"),
    "custom_megatron_before_train_step_hook_path": [
        ("train_side", "before_train_step"), ("train_side", "second_before_train_step"),
    ],
    "custom_model_provider_path": ("train_side", "model_provider"),
}  # fmt: skip
CUSTOM_RUN = {
    **EVERYWHERE,
    "custom_generate_function_path": ("rollout_side", "generate"),
    "custom_agent_function_path": ("services", "agent"),
    "custom_rm_path": ("rollout_side", "group_reward"),
    "custom_loss_function_path": ("train_side", "loss"),
}


class Run:
    """A finished run and what its hooks saw."""

    def __init__(self, folder, model, name, hooks, *flags):
        self.folder, self._seen = folder / name, folder / f"{name}-seen"
        self._seen.mkdir(parents=True)
        toml = folder / f"{name}.toml"
        toml.write_text(COMMON + "[hooks]\n" + "".join(f"{flag} = {_value(v)}\n" for flag, v in hooks.items()))
        words = ["--hf-checkpoint", model, "--prompt-data", folder / "prompts.jsonl", "--run-dir", self.folder]
        words += ["--eval-prompt-data", folder / "prompts.jsonl", "--overwrite", *flags]
        self.done = subprocess.run(
            [sys.executable, "-m", "miles_api.cli", "train", toml, *map(str, words)],
            capture_output=True, text=True, timeout=280, check=False,
            env={**os.environ, "MILES_TEST_SEEN": str(self._seen)},
        )  # fmt: skip
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr

    def saw(self, hook):
        file = self._seen / f"{hook}.jsonl"
        assert file.exists(), f"{hook} did not fire; these did: {sorted(p.stem for p in self._seen.iterdir())}"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def rows(self, kind):
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["metrics"] for line in lines if line["kind"] == kind]

    def hooks(self):
        return json.loads((self.folder / "hooks.json").read_text())


def _value(value):
    values = value if isinstance(value, list) else [value]
    return (
        json.dumps([v if isinstance(v, str) else reference(*v) for v in values])
        if isinstance(value, list)
        else (json.dumps(value if isinstance(value, str) else reference(*value)))
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A random model whose tokenizer has a chat template, and one token that is a whole tool call."""
    folder = tmp_path_factory.mktemp("every")
    # Few tokens, so that a random model calls the tool and ends its answer now and then.
    tokens = ["<pad>", "<|im_end|>", "<|im_start|>", "<unk>", TOOL_CALL, *"\ngo"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True, dtype="float32",
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    lines = [{"prompt": [{"role": "user", "content": word}], "label": word} for word in ("go", "on", "at", "in", "by")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def policy(prepared):
    return Run(
        prepared, prepared / "model", "policy", POLICY_RUN, "--use-tis", "--over-sampling-batch-size", 5,
        "--save-debug-train-data", prepared / "train.dump", "--generate-tool-call-parser", "hermes",
    )  # fmt: skip


@pytest.fixture(scope="module")
def custom(prepared):
    return Run(
        prepared, prepared / "model", "custom", CUSTOM_RUN, "--loss-type", "custom_loss", "--group-rm",
        "--reward-key", "half", "--rollout-max-response-len", 96,
    )  # fmt: skip


def test_the_two_runs_configure_every_hook_of_the_table():
    flags = {field for run in (POLICY_RUN, CUSTOM_RUN) for field in run}
    assert {spec.field for spec in REGISTRY.values() if spec.field} == flags


def test_every_configured_hook_was_called_according_to_hooks_json(policy, custom):
    loaded = [hook for run in (policy, custom) for hook in run.hooks() if hook["process"] != "driver"]
    called = {hook["hook"] for hook in loaded if hook["calls"]}
    # Built or read once, rather than called; and a run that ends well aborts no agent.
    assert called | {"data_source", "router_middleware", "agent_abort"} == set(REGISTRY)
    assert {hook["hook"] for hook in loaded} == set(REGISTRY)


# What the rollout process calls


def test_the_rollout_class_is_called_with_its_input_and_its_metrics_are_logged(policy):
    assert [call["version"] for call in policy.saw("rollout")] == ["0", "1"]
    assert policy.saw("rollout_log")[0]["metrics"]["rollout/mine"] == 7.0


def test_a_function_evaluates_in_the_place_of_the_rollout_class(policy):
    assert {call["evaluation"] for call in policy.saw("eval_rollout")} == {True}
    assert {call["input"] for call in policy.saw("rollout")} == {"RolloutFnTrainInput"}
    assert policy.saw("eval_rollout")[0]["source"] == "Source"


def test_a_log_hook_that_returns_true_silences_the_built_in_log(policy, custom):
    assert not any("rollout/reward" in row for row in policy.rows("rollout"))
    assert all("rollout/reward" in row for row in custom.rows("rollout"))
    assert not any(name.startswith("eval/") for row in policy.rows("eval") for name in row)
    assert [call["rewards"] for call in policy.saw("eval_rollout_log")] == [[0.25]] * 3
    assert {call["samples"] for call in policy.saw("rollout_log")} == {9}


def test_a_dropped_group_is_replaced_and_the_second_filter_does_not_see_it(policy):
    seen = policy.saw("dynamic_filter")
    assert all(all(call["scored"]) for call in seen)
    dropped = seen[0]["group"]
    assert dropped not in [call["group"] for call in policy.saw("dynamic_filter_second")]
    assert dropped not in [group for call in policy.saw("convert_samples") for group, _ in call["order"]]
    assert policy.saw("rollout_log")[0]["metrics"]["rollout/dropped/the_first"] == 1.0


def test_all_samples_are_shown_with_the_dropped_ones_and_leftovers_come_back_newest_first(policy):
    assert policy.saw("dynamic_filter")[0]["group"] in policy.saw("all_samples_process")[0]["groups"]
    taken = policy.saw("buffer_filter")[0]["taken"]
    assert taken == sorted(taken, reverse=True)


def test_every_sample_that_trains_was_scored_with_its_whole_response(policy):
    calls = policy.saw("reward")
    trained = {index for call in policy.saw("convert_samples") for _, index in call["order"]}
    assert {call["index"] for call in calls} >= trained
    assert all(0 < call["mask"] <= call["tokens"] for call in calls)


def test_a_group_reward_gets_whole_groups_and_a_key_picks_its_number(custom):
    assert {call["size"] for call in custom.saw("group_reward")} == {3}
    assert custom.rows("rollout")[0]["rollout/reward"] == pytest.approx(0.5)


def test_post_processed_rewards_reach_the_trainer_in_the_order_of_conversion(policy):
    for converted, advantage in zip(policy.saw("convert_samples"), policy.saw("advantage"), strict=True):
        assert converted["order"] == sorted(converted["order"])
        assert set(converted["rewards"]) <= {2.0, 3.0, 4.0}
        assert advantage["rewards"] == converted["rewards"]


# What the trainer calls


def test_postprocess_sees_whole_tensors_of_the_promised_types_and_unknown_columns(policy):
    for call, converted in zip(policy.saw("rollout_data_postprocess"), policy.saw("convert_samples"), strict=True):
        assert call["kinds"] == {
            "tokens": [9, "torch.int64/1"], "loss_masks": [9, "torch.float32/1"], "log_probs": [9, "torch.float32/1"],
            "advantages": [9, "torch.float32/1"],
        }  # fmt: skip
        assert all(call["whole"])
        assert call["mine"] == [index for _, index in converted["order"]]


def test_removed_samples_leave_the_loss_and_tool_output_with_them(policy):
    call, removed = policy.saw("rollout_data_postprocess")[0], policy.saw("sample_filter")[0]["removed"]
    for index, mask in zip(call["mine"], call["masks"], strict=True):
        assert (mask == 0) == (index in removed)


def test_masks_changed_after_conversion_are_those_that_the_loss_sees(policy):
    before = [mask for call in policy.saw("rollout_data_postprocess") for mask in call["masks"]]
    after = [mask for call in policy.saw("importance_weights") for mask in call["masks"]]
    assert sum(after) < sum(before)


def test_importance_weights_get_the_policy_loss_of_every_token_and_their_metrics_are_reported(policy):
    for call in policy.saw("importance_weights"):
        assert call["pg_loss"] == [sum(call["lengths"])]
        assert call["advantage_is_whole"]
        assert call["rest"] == ["max_seq_lens", "parallel_state"]
    # 3.0 for every token: samples without a token in the loss do not pull the mean down.
    assert [row["train/mine"] for row in policy.rows("rollout")] == pytest.approx([3.0, 3.0])


def test_trainer_and_engine_agree_about_conversations_with_tools(policy, custom):
    assert policy.saw("execute_tool")[0] == {"name": "look", "params": {"key": "a"}}
    assert max(call["gap"] for call in policy.saw("importance_weights")[:1]) < 1e-4
    assert max(row["train/logprob_gap_max"] for row in policy.rows("rollout")) < 1e-3
    assert max(row["train/logprob_gap_max"] for row in custom.rows("rollout")) < 1e-3


def test_the_reducer_is_asked_for_every_micro_batch_of_a_policy_loss(policy):
    assert len(policy.saw("pg_loss_reducer")) == len(policy.saw("importance_weights"))


def test_a_custom_loss_trains_and_its_metrics_are_reported(custom):
    calls = custom.saw("loss")
    assert len(calls) == 2 * 3
    assert {call["logits"] for call in calls} == {2}
    assert all({"advantages", "loss_masks", "tokens", "rollout_log_probs"} <= set(call["columns"]) for call in calls)
    assert all(row["train/mine"] > 0 for row in custom.rows("rollout"))
    assert all(row["train/grad_norm"] > 0 for row in custom.rows("rollout"))


def test_a_model_from_a_provider_keeps_what_the_provider_froze(policy, prepared):
    from safetensors.torch import load_file

    def norm(folder):
        (file,) = folder.glob("*.safetensors")
        return load_file(file)["model.norm.weight"]

    (checkpoint,) = (policy.folder / "checkpoints").glob("rollout_*")
    assert torch.equal(norm(checkpoint / "hf"), norm(prepared / "model"))
    assert policy.saw("model_provider") == [{"layers": 2, "hidden": 32, "seed": 1234}]


def test_moments_of_a_trainer_are_in_order_and_counted(policy):
    assert policy.saw("megatron_init") == [{"world": 1}]
    assert [call["prefix"] for call in policy.saw("before_log_prob")] == ["", ""]
    steps = [(call["rollout_id"], call["step_id"]) for call in policy.saw("before_train_step")]
    assert steps == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len(policy.saw("before_train_step_second")) == 6


def test_a_finished_checkpoint_is_shown_whole(policy):
    (call,) = policy.saw("post_save")
    assert call["rollout_id"] == 1
    assert set(call["names"]) >= {"hf", "rollout", "state.json", "trainer"}
    assert call["hf"]
    assert [call["save"].count("staging") for call in policy.saw("data_source.save")] == [1]


# Agents and the router


def test_an_agents_conversation_is_one_sample_that_a_generate_hook_may_mark(custom):
    assert {call["messages"] for call in custom.saw("agent")} == {4}
    turns = [call["turns"] for call in custom.saw("generate")]
    # A long first answer leaves no room for a second.
    assert max(turns) == 2
    assert min(turns) >= 1


def test_every_generation_passes_through_the_middleware(policy):
    assert len(policy.saw("router_middleware")) == 1
    assert len(policy.saw("router_middleware.generate")) >= 2 * 9
