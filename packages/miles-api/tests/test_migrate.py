"""`miles migrate`: what a launch script says, read as the shell would, and what becomes of each flag."""

import importlib.util
import tomllib

import pytest

from miles_api.cli import main
from miles_api.config import option_groups
from miles_api.errors import DataError
from miles_api.migrate import migrate, read_script, to_toml, translate
from miles_api.migrate.lexer import Assignment, tokens
from miles_api.parsing.parse import parse_run

needs_every_package = pytest.mark.skipif(
    any(importlib.util.find_spec(f"miles_{name}") is None for name in ("rollout", "train")),
    reason="flags become options of packages that are not installed here",
)

LAUNCH = """\
#!/bin/bash
# Start over.
pkill -9 sglang 2>/dev/null || true
set -ex

GPUS=4
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${HERE}/models/tiny.sh"

CKPT_ARGS=(
   --hf-checkpoint /models/tiny
   #--hf-checkpoint /models/other
   --ref-load /models/tiny_dist
   --load /out/tiny/   # where it was left
   --save /out/tiny/
)
ROLLOUT_ARGS=(
   --prompt-data "${DATA_DIR:-/data}/train.jsonl"
   --label-key label
   --rollout-batch-size 8
   --n-samples-per-prompt 4
   --global-batch-size $((8 * 4 / 2))
   --rollout-max-response-len 64
   --rollout-temperature 0.8
   --rollout-stop "</answer>" 'two words'
   --num-rollout 20
   --rm-type math

   --balance-data
)
EVAL_ARGS=(--eval-interval 5 --eval-prompt-data held /data/held.jsonl)
GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --eps-clip-high 0.28
   --disable-grpo-std-normalization
)
OPTIMIZER_ARGS=(--optimizer adam --lr 1e-6 --adam-beta2 0.98)
if [ -n "$WANDB_KEY" ]; then
   WANDB_ARGS=(--use-wandb --wandb-key ${WANDB_KEY})
fi
if [[ "$GPUS" == "8" ]]; then
   PERF_ARGS=(--tensor-model-parallel-size 4)
else
   PERF_ARGS=(--tensor-model-parallel-size 2)
   PERF_ARGS+=(--use-dynamic-batch-size --max-tokens-per-gpu 512)
fi
SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 2
   --sglang-mem-fraction-static 0.7
)

ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json='{"env_vars": {"A": "1"}}' \\
   -- python3 train.py \\
   --actor-num-nodes 1 \\
   --actor-num-gpus-per-node ${GPUS} \\
   --colocate \\
   ${MODEL_ARGS[@]} \\
   "${CKPT_ARGS[@]}" \\
   "${ROLLOUT_ARGS[@]}" ${EVAL_ARGS[@]} ${GRPO_ARGS[@]} ${OPTIMIZER_ARGS[@]} \\
   ${WANDB_ARGS[@]} ${PERF_ARGS[@]} ${SGLANG_ARGS[@]}
ray stop
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch.sh").write_text(LAUNCH)
    return tmp_path


def words(folder, text):
    """Return the arguments of the `train.py` in a script."""
    path = folder / "script.sh"
    path.write_text(text)
    return [argument.text for argument in read_script(str(path)).arguments]


def outcome(folder, flags):
    """Migrate a bare list of arguments."""
    (folder / "flags.txt").write_text(flags)
    return migrate(read_script(str(folder / "flags.txt")))


def taken(migration):
    return {entry.key: entry.value for entry in migration.entries}


# Reading a script


def test_arrays_continued_lines_comments_and_variables_are_read_as_the_shell_reads_them(folder):
    script = """\
NAME=big   # a remark
DIR="/data/$NAME"
A=( --one "${DIR}/a b" \\
    # --left-out 1
    --two 'a$NAME' "" )
A+=(--three=3)
python3 -u train.py --zero "${A[@]}" "${NONE[@]}" ${UNSET_LIST[@]}  # done
"""
    assert words(folder, script) == ["--zero", "--one", "/data/big/a b", "--two", "a$NAME", "", "--three=3"]
    assert words(folder, script.replace('"${A[@]}"', "${A[@]}")) == [
        "--zero", "--one", "/data/big/a", "b", "--two", "a$NAME", "--three=3",
    ]  # fmt: skip


def test_an_unquoted_variable_is_split_at_spaces_and_a_quoted_one_is_not(folder):
    assert words(folder, 'X="1 2"\npython train.py --a $X --b "$X"') == ["--a", "1", "2", "--b", "1 2"]


def test_defaults_in_expansions_count_as_with_an_empty_environment(folder):
    script = 'export PORT=${PORT:-"80"}\nHOST=${A:-${B:-here}}\npython train.py --port ${PORT} --host $HOST --n ${1:-3}'
    assert words(folder, script) == ["--port", "80", "--host", "here", "--n", "3"]


def test_arithmetic_and_paths_beside_the_script_are_worked_out(folder):
    script = """\
DIR=$(cd "$(dirname "$0")/.." && pwd)
N=4
python train.py --size $((N * (3 - 1))) --name $(basename "$DIR/x.json") --dir $DIR --date $(date)
"""
    assert words(folder, script) == [
        "--size", "8", "--name", "x.json", "--dir", str(folder.parent), "--date", "$(date)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "branch"),
    [
        ('[ "$MODE" = "fast" ]', "then"),
        ('[[ "$MODE" != "fast" ]]', "else"),
        ('[ -z "$NOT_SET" ]', "then"),
        ('[[ -n "${NOT_SET:-}" && "$MODE" == "fast" ]]', "else"),
        ('[ -n "$NOT_SET" ] || [ "$MODE" = "fast" ]', "then"),
        ("! [ $COUNT -eq 2 ]", "else"),
    ],
)
def test_conditions_that_the_script_decides_are_followed(folder, condition, branch):
    script = f"MODE=fast\nCOUNT=2\nif {condition}; then\n  A=then\nelse\n  A=else\nfi\npython train.py --a $A"
    assert words(folder, script) == ["--a", branch]


def test_flags_under_a_condition_that_only_the_run_can_decide_are_named_as_left_out(folder):
    script = (
        "A=(--one)\nif nvidia-smi | grep -q H100; then\n  A+=(--two)\nelse\n  A+=(--three)\nfi\npython train.py ${A[@]}"
    )
    (folder / "s.sh").write_text(script)
    found = read_script(str(folder / "s.sh"))
    assert [argument.text for argument in found.arguments] == ["--one"]
    assert [note.partition(":")[0] for note in found.notes] == ["line 3", "line 5"]


def test_loops_cases_and_functions_are_not_followed(folder):
    script = """\
usage() {
  echo "--not a flag"
  LR=9
}
LR=1
while [[ $# -gt 0 ]]; do
  case "$1" in
    --lr) LR="$2"; shift 2 ;;
    *) exit 1 ;;
  esac
done
for i in 1 2; do LR=3; done
cat <<EOF
python train.py --not-this
EOF
[ -z "$X" ] && LR=5
[ -n "$X" ] && LR=6
cd /tmp && python3 /opt/train_async.py --lr $LR
"""
    assert words(folder, script) == ["--lr", "5"]


def test_a_sourced_file_is_read_where_it_is_there(folder):
    (folder / "models").mkdir()
    (folder / "models" / "tiny.sh").write_text("MODEL_ARGS=(--num-layers 2)\n")
    found = read_script(str(folder / "launch.sh"))
    layers = next(argument for argument in found.arguments if argument.text == "--num-layers")
    assert layers.place == "tiny.sh line 1"
    assert found.notes == []


def test_a_script_without_a_launch_and_a_python_program_are_refused(folder):
    (folder / "nothing.sh").write_text("echo hello\n")
    (folder / "run.py").write_text("print()\n")
    for name in ("nothing.sh", "run.py", "missing.sh"):
        with pytest.raises(DataError, match=name):
            read_script(str(folder / name))


def test_text_that_is_no_proper_shell_is_read_to_its_end():
    for text in ("A=(--one 'x", 'B="$(', "${", "if", "$((", "`", "fi }", "<<EOF", ")", "A+=(", "case x in"):
        assert all(token is not None for token in tokens(text))
    assert isinstance(tokens("A=(--one 'x")[0], Assignment)


# What becomes of flags


@needs_every_package
def test_a_launch_script_becomes_a_run_file_that_parses(folder, capsys):
    assert main(["migrate", "launch.sh"]) == 0
    said = capsys.readouterr()
    assert said.out == "wrote run.toml; next: miles check run.toml\n"
    written = tomllib.loads((folder / "run.toml").read_text())
    assert written["run"] == {
        "hf_checkpoint": "/models/tiny", "num_rollout": 20, "rollout_batch_size": 8,
        "n_samples_per_prompt": 4, "global_batch_size": 16, "rollout_temperature": 0.8, "eval_interval": 5,
        "save": "/out/tiny/",
    }  # fmt: skip
    config = parse_run(["run.toml"])
    args = config.args
    assert (args.lr, args.adam_beta2, args.eps_clip_high, args.grpo_std_normalization) == (1e-6, 0.98, 0.28, False)
    assert args.rollout_stop == ["</answer>", "two words"]
    assert args.prompt_data == "/data/train.jsonl"
    assert args.tensor_model_parallel_size == 2
    assert (args.colocate, args.rollout_num_gpus_per_engine) == (True, 2)
    assert "models/tiny.sh is not here" in said.err


@needs_every_package
def test_every_flag_is_taken_over_or_named_with_its_line_and_a_reason(folder):
    migration = migrate(read_script("launch.sh"))
    flags = [a for a in read_script("launch.sh").arguments if a.text.startswith("--")]
    assert migration.count == len(flags)
    assert migration.taken + len(migration.dropped) + len(migration.lacking) == len(flags)
    assert {left.flag.split()[0] for left in migration.dropped} == {
        "--ref-load", "--load", "--optimizer",
    }  # fmt: skip
    line = 1 + LAUNCH.splitlines().index("   --sglang-mem-fraction-static 0.7")
    assert [(left.flag, left.place) for left in migration.lacking] == [
        ("--sglang-mem-fraction-static 0.7", f"line {line}")
    ]
    assert all(left.reason for left in migration.dropped + migration.lacking)


@needs_every_package
def test_where_the_older_stack_has_another_default_it_is_written_down(folder):
    found = taken(outcome(folder, "--eval-prompt-data a x.jsonl --rollout-temperature 0.7"))
    assert found["input_key"] == "input"
    assert found["weight_decay"] == 0.01
    assert found["eval_temperature"] == 0.7
    given = taken(outcome(folder, "--input-key prompt --weight-decay 0.1"))
    assert given["input_key"] == "prompt"
    assert given["weight_decay"] == 0.1
    assert "eval_temperature" not in given


@needs_every_package
def test_hooks_get_their_short_names_and_our_defaults_are_left_out(folder):
    migration = outcome(
        folder,
        "--rollout-function-path slime.rollout.sglang_rollout.generate_rollout "
        "--dynamic-sampling-filter-path miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std "
        "--custom-generate-function-path mine.gen --custom-rm-path slime.rollout.no_such.thing",
    )
    assert taken(migration)["dynamic_sampling_filter_path"] == "check_reward_nonzero_std"
    assert taken(migration)["custom_generate_function_path"] == "mine.gen"
    assert [left.reason for left in migration.dropped] == ["that is the default here"]
    assert "slime.rollout.no_such.thing" in migration.lacking[0].reason


@needs_every_package
def test_values_that_do_not_fit_are_named_and_not_written(folder):
    migration = outcome(
        folder,
        "--advantage-estimator imaginary --num-rollout many --rollout-shuffle yes --rollout-top-p 1.5 --lr 1 2 "
        "--apply-chat-template-kwargs {x --rollout-top-k -1",
    )
    assert [left.flag.split()[0] for left in migration.unfit] == [
        "--advantage-estimator", "--num-rollout", "--rollout-shuffle", "--rollout-top-p", "--lr",
        "--apply-chat-template-kwargs",
    ]  # fmt: skip
    assert taken(migration)["rollout_top_k"] == -1
    assert not {"num_rollout", "lr", "rollout_top_p"} & set(taken(migration))


def test_a_value_from_the_environment_is_not_written_and_the_option_is_named(folder):
    migration = outcome(folder, "--hf-checkpoint ${MODEL_DIR}/tiny --num-rollout 3")
    assert "MODEL_DIR" in migration.unfit[0].reason
    assert "hf_checkpoint" in migration.unfit[0].reason
    assert "hf_checkpoint" not in taken(migration)


@needs_every_package
def test_several_evaluation_files_a_parquet_file_and_a_slice_are_pointed_out(folder):
    migration = outcome(folder, "--eval-prompt-data a x.jsonl b y.jsonl --prompt-data /d/train.parquet")
    doubts = {entry.key: entry.doubt for entry in migration.entries}
    assert "b" in doubts["eval_prompt_data"]
    assert "JSONL" in doubts["prompt_data"]
    assert "@[" in outcome(folder, "--prompt-data x.jsonl@[0:3]").entries[0].doubt


@needs_every_package
def test_a_kl_penalty_in_the_loss_is_taken_over_with_the_estimate_that_is_the_default_there(folder):
    migration = outcome(folder, "--hf-checkpoint m --use-kl-loss --kl-loss-coef 0.1 --ref-load r --use-unbiased-kl")
    found = taken(migration)
    expected = {"use_kl_loss": True, "kl_loss_coef": 0.1, "use_unbiased_kl": True, "kl_loss_type": "k1"}
    assert found.items() >= expected.items()
    given = taken(outcome(folder, "--hf-checkpoint m --use-kl-loss --kl-loss-type low_var_kl --ref-load m"))
    assert (given["kl_loss_type"], given["ref_load"]) == ("low_var_kl", "m")
    bridged = outcome(folder, "--hf-checkpoint r --use-kl-loss --ref-load r --megatron-to-hf-mode bridge")
    assert taken(bridged)["ref_load"] == "r"
    [entry] = [entry for entry in bridged.entries if entry.key == "use_kl_loss"]
    assert "only reported" in entry.remark


@needs_every_package
def test_parts_of_a_kl_penalty_that_have_no_effect_there_are_not_needed(folder):
    migration = outcome(folder, "--kl-loss-coef 0.1 --kl-loss-type k2 --use-unbiased-kl --kl-coef 0.0")
    assert len(migration.dropped) == migration.count == 4
    assert not {"kl_loss_type", "normalize_advantages"} & set(taken(migration))
    migration = outcome(folder, "--advantage-estimator gspo --kl-coef 0.1 --kl-loss-type k2")
    assert [left.flag for left in migration.dropped] == ["--kl-coef 0.1", "--kl-loss-type k2"]


@needs_every_package
def test_a_kl_penalty_in_the_reward_is_taken_over_and_where_it_is_another_that_is_said(folder):
    migration = outcome(folder, "--advantage-estimator reinforce_plus_plus --kl-coef 0.1 --ref-load r")
    assert taken(migration).items() >= {"kl_coef": 0.1, "kl_loss_type": "k1"}.items()
    assert not any(entry.doubt for entry in migration.entries)
    migration = outcome(folder, "--advantage-estimator reinforce_plus_plus_baseline --kl-coef 0.1")
    [entry] = [entry for entry in migration.entries if entry.key == "kl_coef"]
    assert "its own alone there" in entry.doubt


@needs_every_package
@pytest.mark.parametrize("objective", ["", "--use-kl-loss ", "--loss-type sft_loss "])
def test_a_reference_that_is_another_model_than_hf_checkpoint_holds_the_first_weights_and_is_to_be_looked_at(
    folder, objective
):
    same = outcome(folder, f"{objective}--hf-checkpoint /m/Qwen3-4B/ --ref-load /c/Qwen3-4B_torch_dist/")
    assert [left.flag for left in same.dropped] == ["--ref-load /c/Qwen3-4B_torch_dist/"]
    for other in ("/c/warm_torch_dist", "/c/Qwen3-4B-SFT_torch_dist"):
        [left] = outcome(folder, f"{objective}--hf-checkpoint /m/Qwen3-4B --ref-load {other}").lacking
        assert left.flag == f"--ref-load {other}"
        assert "also the first weights there" in left.reason
        assert "convert it to a Hugging Face directory and name it as hf_checkpoint" in left.reason
    bridged = outcome(folder, f"{objective}--hf-checkpoint /m/a --ref-load /m/b --megatron-to-hf-mode bridge")
    said = [entry.doubt for entry in bridged.entries] + [left.reason for left in bridged.lacking]
    assert any("also the first weights there: name it as hf_checkpoint" in text for text in said)
    assert "--ref-load /m/b" not in [left.flag for left in bridged.dropped]


@needs_every_package
def test_a_critic_that_is_another_model_than_hf_checkpoint_is_to_be_looked_at(folder):
    flags = "--advantage-estimator ppo --hf-checkpoint /m/tiny --critic-load"
    assert [left.flag for left in outcome(folder, f"{flags} /c/tiny_dist").dropped] == ["--critic-load /c/tiny_dist"]
    [left] = outcome(folder, f"{flags} /c/judge_dist").lacking
    assert "convert it to a Hugging Face directory and name it as critic_load" in left.reason


PPO_FLAGS = (
    "--lambd 0.9 --gamma 0.99 --value-clip 0.3 --critic-lr 1e-5 --critic-lr-warmup-iters 3 --num-critic-only-steps 2"
)


@needs_every_package
def test_the_flags_of_ppo_are_taken_over_with_it_and_not_needed_without(folder):
    migration = outcome(folder, f"--hf-checkpoint m --advantage-estimator ppo {PPO_FLAGS} --critic-load c")
    expected = {
        "advantage_estimator": "ppo", "lambd": 0.9, "gamma": 0.99, "value_clip": 0.3, "critic_lr": 1e-5,
        "critic_lr_warmup_iters": 3, "num_critic_only_steps": 2, "normalize_advantages": False,
    }  # fmt: skip
    assert taken(migration).items() >= expected.items()
    assert [left.flag for left in migration.lacking] == ["--critic-load c"]
    without = outcome(folder, f"{PPO_FLAGS} --critic-load c")
    assert len(without.dropped) == without.count == 7


@needs_every_package
def test_advantages_are_whitened_where_the_script_asks_for_it_whatever_our_estimator_does_by_itself(folder):
    flags = "--advantage-estimator reinforce_plus_plus --gamma 0.9 --eps-clip-c 3.0"
    found = taken(outcome(folder, f"{flags} --normalize-advantages"))
    expected = {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.9, "eps_clip_c": 3.0}
    assert found.items() >= (expected | {"normalize_advantages": True}).items()
    assert taken(outcome(folder, flags))["normalize_advantages"] is False
    migration = outcome(folder, "--advantage-estimator grpo --gamma 0.9 --normalize-advantages")
    assert [left.flag for left in migration.dropped] == ["--gamma 0.9"]
    assert taken(migration)["normalize_advantages"] is True
    assert "normalize_advantages" not in taken(outcome(folder, "--advantage-estimator grpo"))


@needs_every_package
def test_micro_batches_of_a_number_of_samples_stay_such_and_packed_ones_stay_packed(folder):
    found = taken(outcome(folder, "--micro-batch-size 2 --balance-data --log-probs-chunk-size 512"))
    expected = {"micro_batch_size": 2, "use_dynamic_batch_size": False, "balance_data": True}
    assert found.items() >= (expected | {"log_probs_chunk_size": 512}).items()
    migration = outcome(folder, "--micro-batch-size 2 --use-dynamic-batch-size --log-probs-chunk-size -1")
    assert taken(migration)["use_dynamic_batch_size"] is True
    assert [left.flag for left in migration.dropped] == ["--micro-batch-size 2"]
    (folder / "whole.toml").write_text(to_toml(migration))
    assert parse_run([str(folder / "whole.toml")]).args.log_probs_chunk_size is None
    assert "use_dynamic_batch_size" not in taken(outcome(folder, "--num-rollout 3"))


@needs_every_package
def test_a_teacher_in_the_trainer_is_taken_over_and_one_behind_a_server_is_a_hooks(folder):
    migration = outcome(folder, "--use-opd --opd-type megatron --opd-kl-coef 0.5 --opd-teacher-load t")
    assert taken(migration).items() >= {"use_opd": True, "opd_kl_coef": 0.5, "opd_teacher_load": "t"}.items()
    assert [left.flag for left in migration.dropped] == ["--opd-type megatron"]
    assert any("Hugging Face" in entry.doubt for entry in migration.entries)
    [left] = outcome(folder, "--use-opd --opd-type sglang").lacking
    assert "teacher_log_probs" in left.reason
    assert len(outcome(folder, "--opd-kl-coef 0.5 --opd-type sglang").dropped) == 2


@needs_every_package
@pytest.mark.parametrize("prefix", ["--router-", "--sglang-router-"])
def test_settings_of_the_older_router_become_those_of_ours(folder, prefix):
    flags = {"max-concurrent-requests": 64, "queue-size": 100, "queue-timeout-secs": 60, "request-timeout-secs": 900}
    migration = outcome(folder, " ".join(f"{prefix}{name} {value}" for name, value in flags.items()))
    assert taken(migration).items() >= {
        "router_max_requests": 64, "router_queue_size": 100, "router_queue_timeout": 60, "router_request_timeout": 900,
    }.items()  # fmt: skip
    assert taken(outcome(folder, f"{prefix}max-concurrent-requests -1"))["router_max_requests"] == 0
    [left] = outcome(folder, f"{prefix}retry-max-retries 3").lacking
    assert "miles-router" in left.reason


@needs_every_package
@pytest.mark.parametrize("flag", ["--router-policy", "--sglang-router-policy"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(name, name) for name in ("random", "round_robin", "power_of_two", "consistent_hashing")]
    + [("cache_aware", "prefix_aware"), ("manual", "sticky")],
)
def test_policies_of_the_older_router_become_those_of_ours(folder, flag, theirs, ours):
    assert taken(outcome(folder, f"{flag} {theirs}"))["router_policy"] == ours


@needs_every_package
def test_a_policy_that_our_router_lacks_does_not_fit(folder):
    [left] = outcome(folder, "--router-policy bucket").unfit
    assert "least_outstanding" in left.reason


def test_one_file_for_all_rollouts_takes_the_place_of_a_name_with_a_placeholder(folder):
    found = taken(outcome(folder, "--save-debug-rollout-data d/{rollout_id}.pt --save-hf hf/iter_{rollout_id}"))
    assert (found["save_debug_rollout_data"], found["save_hf"]) == ("d/rollout.mdump", "hf")


@needs_every_package
def test_supervised_and_asynchronous_launches_are_told_apart(folder):
    (folder / "sft.sh").write_text(
        "python3 train_async.py --rollout-function-path slime.rollout.sft_rollout.generate_rollout "
        "--loss-type sft_loss --debug-train-only --num-epoch 3"
    )
    migration = migrate(read_script("sft.sh"))
    assert taken(migration)["rollout_function_path"] == "sft"
    assert [left.flag for left in migration.dropped] == ["--debug-train-only"]
    assert [left.flag for left in migration.lacking] == ["--num-epoch 3", "train_async.py"]
    assert "ahead of training" in migration.lacking[1].reason


@needs_every_package
def test_the_last_of_two_equal_flags_counts_and_that_is_said(folder):
    migration = outcome(folder, "--lr 1 --lr 2")
    assert taken(migration)["lr"] == 2.0
    assert "--lr stands twice" in migration.notes[0]


def test_keys_are_not_repeated_anywhere(folder, capsys):
    (folder / "keys.sh").write_text("python train.py --use-wandb --wandb-key abcdef123 --lr 1e-6\n")
    main(["migrate", "keys.sh", "-o", "-"])
    said = capsys.readouterr()
    assert "abcdef123" not in said.out + said.err
    assert "WANDB_API_KEY" in said.err


@needs_every_package
def test_strict_fails_on_a_flag_without_counterpart_and_writes_all_the_same(folder):
    (folder / "one.sh").write_text("python train.py --lr 1e-6 --no-such-flag\n")
    (folder / "two.sh").write_text("python train.py --lr 1e-6\n")
    assert main(["migrate", "one.sh", "-o", "one.toml", "--strict"]) == 1
    assert "--no-such-flag" in (folder / "one.toml").read_text()
    assert main(["migrate", "two.sh", "-o", "two.toml", "--strict"]) == 0


def test_a_file_that_is_there_is_not_written_over(folder, capsys):
    (folder / "run.toml").write_text("mine")
    assert main(["migrate", "launch.sh"]) == 2
    assert (folder / "run.toml").read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err
    assert main(["migrate", "launch.sh", "--overwrite"]) == 0


@pytest.fixture
def api_alone(monkeypatch):
    """Miles without the packages that implement it."""
    ours = {name: kind for name, kind in option_groups().items() if name in ("run", "hooks")}
    monkeypatch.setattr(translate, "option_groups", lambda: ours)
    return ours


def test_a_script_that_is_missing_is_reported_before_a_run_file_that_is_there(folder, capsys):
    (folder / "run.toml").write_text("mine")
    assert main(["migrate", "nofile.sh"]) == 2
    assert "nofile.sh cannot be read" in capsys.readouterr().err


def test_flags_of_packages_that_are_not_installed_are_one_warning_and_not_without_counterpart(
    folder, api_alone, capsys
):
    (folder / "few.sh").write_text(
        "python train.py --num-rollout many --lr 1e-6 --no-such-flag --sglang-x 1 --input-key q --rm-type math\n"
    )
    main(["migrate", "few.sh", "--strict"])
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("warning: miles-rollout, miles-train, miles-router are not installed here: their options ")
    assert err[0].endswith(" flags could not be placed")
    migration = migrate(read_script("few.sh"))
    assert {"--lr", "--no-such-flag", "--input-key"} <= {left.flag.split()[0] for left in migration.unplaced}
    assert f" {len(migration.unplaced)} flags could not be placed" in err[0]
    assert all(left.flag.startswith("--sglang") for left in migration.lacking)
    assert [left.flag.split()[0] for left in migration.unfit] == ["--num-rollout"]
    assert not any("is not installed" in left.reason for left in migration.unfit + migration.lacking)
    assert not any("a hook of yours" in line for line in err)
    assert migration.taken == 0
    text = (folder / "run.toml").read_text()
    assert "Could not be placed" in text
    assert "--lr 1e-6" in text


def test_strict_fails_on_flags_that_could_not_be_placed(folder, api_alone):
    (folder / "one.sh").write_text("python train.py --lr 1e-6\n")
    assert main(["migrate", "one.sh", "--strict"]) == 1
