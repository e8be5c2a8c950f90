"""Whatever is wrong is said before Ray or an engine starts: by flag, value and nearest valid choice; exit code 2."""

import json
import shutil
import socket

import pytest
import ray

from miles_api.cli import main
from miles_api.parse import parse_run
from miles_train.driver import command
from miles_train.driver.check import derive


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
        ({"loss_type": "value_loss"}, "--loss-type value_loss is not trained by this version"),
        ({"custom_rm_path": "nowhere.py:fn"}, "there is no file"),
        ({"custom_rm_path": "json:dmps"}, "did you mean 'dumps'?"),
        ({"custom_rm_path": "os.path:exists"}, "too many positional arguments"),
        ({"custom_megatron_init_path": "os.path:exists"}, "nothing installed calls the megatron_init hook"),
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


def test_a_hook_that_a_run_will_not_call_is_marked_in_the_plan(small_run):
    words = small_run(loss_type="sft_loss")
    lines = command.plan(derive(parse_run(words)))
    assert any("reward:" in line and "(not called: supervised" in line for line in lines)


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
