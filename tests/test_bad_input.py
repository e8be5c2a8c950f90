"""Whatever is wrong is said before Ray or an engine starts: by flag, value and nearest valid choice; exit code 2."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import ray

from miles_api.checks.check import TABLES, check_words
from miles_api.checks.plan import plan_lines
from miles_api.cli import main
from miles_api.config import option_groups

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "ray", "transformers", "megatron", "sglang"}:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Blocker())
from miles_api.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_heavy_imports(*words):
    """Run `miles` where importing torch, Ray, transformers or Megatron fails loudly."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def refused(small_run, capsys):
    def run(*words, **changes):
        code = main(["train", *small_run(**changes), *words])
        assert code == 2
        assert not ray.is_initialized()
        return capsys.readouterr().err

    return run


def test_an_unknown_flag_names_the_nearest(refused):
    assert "unknown flag --rollout-batchsize; did you mean '--rollout-batch-size'?" in refused(
        "--rollout-batchsize", "4"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": "fast"}, "--lr = 'fast': Expected `float`"),
        ({"num_rollout": 0}, "--num-rollout = '0': Expected `int` >= 1"),
        ({"rollout_top_p": 1.5}, "--rollout-top-p = '1.5': Expected `float` <= 1.0"),
        ({"lr_decay_style": "cosin"}, "did you mean 'cosine'?"),
        ({"global_batch_size": 5}, "= 16, but --global-batch-size 5 × --num-steps-per-rollout 2 = 10"),
        ({"num_steps_per_rollout": 3}, "--global-batch-size cannot be derived"),
        ({"tensor_model_parallel_size": 2}, "does not divide the 1 trainer ranks"),
        ({"rm_type": "mth"}, "--rm-type 'mth' is none of math"),
        ({"rm_type": "math"}, "--rm-type math and --custom-rm-path are both set"),
        ({"entropy_coef": 0.1}, "--skip-zero-advantage leaves samples out that --entropy-coef would train"),
        ({"load": "/no/such"}, "--load /no/such holds no checkpoint"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2: this version trains with 1"),
        ({"actor_num_gpus_per_node": 3, "tensor_model_parallel_size": 3}, "num_attention_heads = 4 cannot be divided"),
        ({"actor_num_gpus_per_node": 64}, "--global-batch-size 8 is less than the 64 DP ranks"),
        ({"rollout_max_response_len": 100}, "--rollout-max-response-len 100 leaves no room for a prompt"),
        ({"loss_type": "value_loss"}, "--advantage-estimator grpo has none: pass --advantage-estimator ppo"),
        ({"kl_coef": 0.1}, "--kl-coef 0.1 is taken off plain rewards, and those of --advantage-estimator grpo"),
        ({"kl_loss_type": "k4"}, "--kl-loss-type = 'k4'"),
        ({"lambd": 0.9}, "--lambd 0.9 belongs to --advantage-estimator ppo, which has a critic, not to grpo"),
        ({"micro_batch_size": 2}, "--micro-batch-size 2 needs --no-use-dynamic-batch-size"),
        ({"loss_type": "custom_loss"}, "--loss-type custom_loss needs --custom-loss-function-path"),
        ({"run_dir": "/dev/null/run"}, "--run-dir /dev/null/run cannot be created"),
        ({"custom_rm_path": "nowhere.py:fn"}, "there is no file"),
        ({"custom_rm_path": "json:dmps"}, "did you mean 'dumps'?"),
        ({"custom_rm_path": "os.path:exists"}, "too many positional arguments"),
        ({"prompt_data": "nowhere.jsonl"}, "there is no prompt file"),
        ({"hf_checkpoint": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_value_that_cannot_work_is_named(refused, changes, expected):
    assert expected in refused(**changes)


def test_several_problems_come_in_one_report(refused):
    text = refused(tensor_model_parallel_size=2, rm_type="mth", prompt_data="nowhere.jsonl")
    assert "does not divide" in text
    assert "--rm-type" in text
    assert "there is no prompt file" in text


def test_a_malformed_prompt_line_is_named_by_file_and_line(refused, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"prompt": "sort 12>", "label": "12"}) + '\n{"prompt": \n')
    assert f"{file}, line 2: not a JSON object" in refused(prompt_data=file)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("config.json", "config.json"), ("tokenizer", "holds no tokenizer"), ("model.safetensors", "safetensors")],
)
def test_a_model_directory_that_lacks_a_file_is_named(refused, quickstart_data, tmp_path, missing, expected):
    folder = tmp_path / "model"
    shutil.copytree(quickstart_data / "model", folder)
    for file in folder.glob(f"{missing}*"):
        file.unlink()
    text = refused(hf_checkpoint=folder)
    assert str(folder) in text
    assert expected in text


def test_a_port_in_use_is_named(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--sglang-router-port {port}" in refused(sglang_router_port=port)


def test_the_directory_of_an_earlier_run_is_not_overwritten(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    assert "holds an earlier run" in refused()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "precious"


def test_overwrite_replaces_runs_and_nothing_else(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert "not a run directory" in refused("--overwrite")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_a_checkpoint_is_not_overwritten_by_the_run_that_continues_it(refused, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "which would be overwritten" in refused("--overwrite", load=tmp_path / "run" / "checkpoints")


def test_a_tokenizer_without_a_chat_template_is_named(refused):
    assert "--apply-chat-template: " in refused("--apply-chat-template")


def test_another_runs_checkpoints_are_not_replaced(refused, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "latest.json").write_text("{}")
    assert "holds another run's checkpoints" in refused(save=tmp_path / "kept")


ADVANTAGE = "def advantage(args, rollout_data): ...\n"
WEIGHTS = "def weights(args, *, pg_loss, **more): ...\n"
REDUCER = "def reducer(total_lengths, response_lengths, loss_masks, per_token=False): ...\n"
LOSS = "def loss(args, batch, logits, total): ...\n"


@pytest.mark.parametrize(
    ("source", "flag", "loss_type", "expected"),
    [
        (LOSS, "custom_loss_function_path", "policy_loss", "with --loss-type custom_loss only"),
        (ADVANTAGE, "custom_advantage_function_path", "sft_loss", "would never be called: --loss-type sft_loss"),
        (WEIGHTS, "custom_tis_function_path", "policy_loss", "neither --use-tis nor --get-mismatch-metrics"),
        (WEIGHTS, "custom_tis_function_path", "sft_loss", "only --loss-type policy_loss"),
        (REDUCER, "custom_pg_loss_reducer_function_path", "sft_loss", "only --loss-type policy_loss"),
    ],
)
def test_a_hook_without_its_companion_is_refused(refused, tmp_path, source, flag, loss_type, expected):
    (tmp_path / "own.py").write_text(source)
    name = source.split("(")[0].removeprefix("def ")
    assert expected in refused(**{flag: f"{tmp_path}/own.py:{name}"}, loss_type=loss_type)


def test_tools_come_from_a_hook_or_with_the_prompts(small_run, tmp_path):
    (tmp_path / "own.py").write_text("async def tool(name, params): ...\n")
    words = small_run(generate_execute_tool_function_path=f"{tmp_path}/own.py:tool")
    missing = "needs --generate-tool-specs-path, or prompts with tools (--tool-key)"
    assert any(missing in problem.message for problem in check_words(words, prog="").problems)
    words += ["--tool-key", "tools"]
    assert not any(missing in problem.message for problem in check_words(words, prog="").problems)


def test_a_correction_of_a_loss_that_has_none_is_refused(refused):
    assert "--use-tis belongs to --loss-type policy_loss" in refused("--use-tis", loss_type="sft_loss")


@pytest.mark.parametrize("companion", ["--use-tis", "--get-mismatch-metrics"])
def test_a_hook_with_its_companion_is_part_of_the_plan(small_run, tmp_path, companion):
    (tmp_path / "own.py").write_text(WEIGHTS)
    words = small_run(custom_tis_function_path=f"{tmp_path}/own.py:weights")
    report = check_words([*words, companion], prog="miles check")
    assert report.problems == []
    assert [row.called for row in report.hooks if row.hook == "importance_weights"] == [True]


def test_a_hook_that_a_run_will_not_call_is_marked_in_the_plan(small_run):
    lines = plan_lines(check_words(small_run(loss_type="sft_loss"), prog="miles check"))
    assert any("reward:" in line and "(not called: supervised" in line for line in lines)


def test_a_plan_calls_one_of_a_kind_one(small_run):
    words = small_run(num_rollout=1, rollout_batch_size=1, n_samples_per_prompt=4, num_steps_per_rollout=1)
    first = plan_lines(check_words(words, prog="miles check"))[0]
    assert first.startswith("plan: 1 rollout × 1 prompt × 4 samples, 1 optimizer step of 4; ")


def test_a_pass_that_does_not_run_leaves_its_hook_idle(small_run, tmp_path):
    (tmp_path / "own.py").write_text("def before(args, model, store_prefix): ...\n")
    words = small_run(custom_megatron_before_log_prob_hook_path=f"{tmp_path}/own.py:before")
    (row,) = [row for row in check_words(words, prog="").hooks if row.hook == "before_log_prob"]
    assert (row.called, row.note) == (False, "this run has no pass that only computes log-probs")
    (row,) = [
        row
        for row in check_words([*words, "--no-use-rollout-logprobs"], prog="").hooks
        if row.hook == "before_log_prob"
    ]
    assert row.called


def test_without_a_trainer_its_hooks_are_idle_and_no_trainer_is_planned(small_run, tmp_path):
    (tmp_path / "own.py").write_text("def init(args): ...\n")
    words = [*small_run(custom_megatron_init_path=f"{tmp_path}/own.py:init"), "--debug-rollout-only"]
    report = check_words(words, prog="miles check")
    assert report.problems == []
    assert [(row.called, row.note) for row in report.hooks if row.hook == "megatron_init"] == [
        (False, "--debug-rollout-only trains nothing")
    ]
    assert any("no trainer starts" in line for line in plan_lines(report))
    assert report.notes == ["debug_rollout_only: nothing is trained, and no checkpoint is written"]


def test_a_recording_that_is_not_there_or_would_be_replaced_is_refused(refused, tmp_path):
    assert "there is no such file" in refused(load_debug_rollout_data="/no/dump")
    (tmp_path / "dump").write_text("precious")
    assert "exists already" in refused(save_debug_rollout_data=tmp_path / "dump")
    assert (tmp_path / "dump").read_text() == "precious"


def test_the_last_line_of_a_prompt_file_is_checked_too(refused, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "sort 12>", "label": "12"}) + "\n" + json.dumps({"prompt": "x"}) + "\n")
    assert f"{file}, line 2: no key 'label'" in refused(prompt_data=file)


def test_check_says_what_train_would_refuse_and_starts_as_little(small_run, capsys):
    words = small_run(tensor_model_parallel_size=2, prompt_data="nowhere.jsonl", num_rollout=0)
    assert main(["check", *words]) == main(["train", *words]) == 2
    checked, trained = capsys.readouterr().err.split("miles train: ")
    assert checked.splitlines()[1:] == trained.splitlines()
    assert len(trained.splitlines()) >= 3


def test_the_quickstart_is_checked_without_torch_ray_or_transformers(small_run):
    run = without_heavy_imports("check", *small_run())
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("plan: 3 rollouts × 4 prompts × 4 samples")
    assert "reward: " in run.stdout


def test_what_train_refuses_it_refuses_before_torch_or_ray_is_loaded(small_run):
    run = without_heavy_imports("train", *small_run(num_rollout=0))
    assert run.returncode == 2, run.stderr
    assert "--num-rollout = '0'" in run.stderr


def test_json_holds_the_plan_and_every_hook(small_run, capsys):
    assert main(["check", "--json", *small_run()]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert said["plan"]["services"] == ["rollout", "engines", "router", "train"]
    assert said["plan"]["global_batch_size"] == 8
    assert [(hook["hook"], hook["called"]) for hook in said["hooks"]] == [("reward", True)]


def test_the_tables_that_miles_api_knows_of_are_those_that_the_packages_have():
    owners = {"miles_train": "train", "miles_rollout": "rollout", "miles_router": "router"}
    sides = {name: owners.get(kind.__module__.partition(".")[0]) for name, kind in option_groups().items()}
    assert {side: {name for name in sides if sides[name] == side} for side in TABLES} == {
        side: set(tables) for side, tables in TABLES.items()
    }


def test_help_begins_with_one_line_of_usage(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: miles train [RUN.toml] [--flag value …]\n\n")
    assert "2 refused before anything started" in text


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
