"""`miles hooks run`: hooks called again on recorded rollouts, and what is said of the difference."""

import json
import sys
import time
from multiprocessing.connection import wait

import pytest

from miles_api.cli import main
from miles_api.config import RunConfig, option_groups
from miles_api.errors import ConfigError, DataError, HookResultError
from miles_api.hooks import REGISTRY
from miles_api.record import DumpHeader, DumpWriter, RecordedGroup, RecordedRollout, RecordedTrainBatch
from miles_api.replay import Request, replay
from miles_api.replay import train as train_module
from miles_api.replay import workers as workers_module
from miles_api.replay.hooks import REFUSED, REPLAYERS
from miles_api.sample import Sample, Status

HOOKS = """\
import asyncio, os, sys, time
import msgspec

def same(args, sample):
    return 1.0 if sample.response == sample.label else 0.0

async def same_async(args, sample):
    await asyncio.sleep(0)
    return same(args, sample)

def generous(args, sample):
    assert sample.reward is None
    return 1.0

def several(args, sample):
    return {"right": 1.0, "length": 4.0}

def broken(args, sample):
    if sample.index == 2:
        return helper(sample)
    return None if sample.index == 4 else 0.0

def helper(sample):
    raise KeyError("no answer")

def hangs(args, sample):
    if sample.index == 1:
        time.sleep(600)
    return 0.0

async def hangs_async(args, sample):
    while sample.index == 1:
        try:
            await asyncio.sleep(600)
        except BaseException:
            pass
    return 0.0

def spins(args, sample):
    while sample.index == 1:
        pass
    return 0.0

def dies(args, sample):
    if sample.index == 1:
        os._exit(7)
    return 0.0

def cancelled(args, sample):
    raise asyncio.CancelledError

async def cancels_itself(args, sample):
    raise asyncio.CancelledError

def by_option(args, sample):
    return args.rollout_temperature

class Options(msgspec.Struct, frozen=True):
    bonus: float = 0.25

def own(args, sample):
    return args.bonus
own.options = Options

class Scorer:
    def __init__(self, args):
        self.key = args.rollout_seed
        self.calls = 0
        self.loop = None
    async def __call__(self, args, sample):
        loop = asyncio.get_running_loop()
        assert self.loop in (None, loop), "another loop"
        self.loop = loop
        self.calls += 1
        return float(self.key)
    async def aclose(self):
        # One write: two processes close at the same time.
        sys.stderr.write(f"closed after {self.calls} calls" + chr(10))

def chatty(args, sample):
    print("noise")
    return 0.0

async def group(args, samples):
    return [float(i) for i, sample in enumerate(samples) if sample.reward is None]

def short(args, samples):
    return [1.0]

def halved(args, samples):
    raw = [sample.get_reward_value(args) for sample in samples]
    return raw, [reward / 2 if sample.group_index == 0 else reward for sample, reward in zip(samples, raw)]

def verdict(args, samples, **kwargs):
    return samples[0].group_index != 0

def mark(args, data):
    for sample in [one for group in data for item in group for one in (item if isinstance(item, list) else [item])]:
        if sample.reward == 0.0:
            sample.remove_sample = True

def takes_out(args, data):
    data.pop()

def look(args, all_samples, data_source):
    all_samples[0][0].metadata["seen"] = True
    all_samples[0][1].mine = 1

def asks(args, all_samples, data_source):
    data_source.get_samples(1)

def convert(args, samples, *, raw_rewards, rewards):
    columns = {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "total_lengths": [len(sample.tokens) for sample in samples],
        "loss_masks": [[1] * sample.response_length for sample in samples],
        "rewards": rewards, "raw_reward": raw_rewards, "truncated": [0] * len(samples),
        "sample_indices": [sample.index for sample in samples],
        "rollout_ids": [sample.rollout_id for sample in samples],
        "group_indices": [sample.group_index for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "round_number": [1] * len(samples),
    }
    return columns

def half_converted(args, samples, *, raw_rewards, rewards):
    return {**convert(args, samples, raw_rewards=raw_rewards, rewards=rewards), "rewards": rewards[:-1]}
"""


def sample(index, group, reward, **fields):
    made = Sample(
        index=index, group_index=group, rollout_id=index, prompt=f"What is {index}?", label="yes", tokens=[1, 2],
        status=Status.COMPLETED, reward=reward, **fields,
    )  # fmt: skip
    made.append_response_tokens([3, 4], log_probs=[-0.5, -0.25], text="yes" if reward else "no")
    return made


def rollout(rollout_id=0):
    """Return a rollout of a kept group, a kept group with a fan-out and a dropped one: 7 samples, 5 of them kept."""
    groups = [
        RecordedGroup([sample(0, 0, 1.0), sample(1, 0, 0.0)]),
        RecordedGroup([[sample(2, 1, 1.0), sample(3, 1, 0.0)], sample(4, 1, 1.0)]),
        RecordedGroup([sample(5, 2, 0.0), sample(6, 2, 0.0)], dropped="zero_std"),
    ]
    kept = [1.0, 0.0, 1.0, 0.0, 1.0]
    return RecordedRollout(rollout_id, "1", False, groups, raw_rewards=kept, rewards=list(kept))


def evaluation():
    return RecordedRollout(0, "1", True, [RecordedGroup([sample(7, 3, 0.0)])])


@pytest.fixture
def dump(tmp_path, monkeypatch):
    """Record rollouts with options; return the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(HOOKS)

    def write(*records, kind="rollout", **options):
        header = DumpHeader(kind=kind, config={**RunConfig.of().public(), **options})
        with DumpWriter("run.mdump", header) as writer:
            for record in records or (rollout(),):
                writer.write(record)
        return "run.mdump"

    return write


def run(hook, function, path="run.mdump", **settings):
    return replay(Request(hook=hook, reference=f"mine.py:{function}", dump=path, **settings), lambda done, bad: None)


# Rewards


@pytest.mark.parametrize("function", ["same", "same_async"])
def test_a_reward_that_scores_as_recorded_changes_nothing(dump, function):
    dump(rollout(0), rollout(1))
    found = run("reward", function)
    assert (found.calls, found.failed, found.changed, found.facts["equal"]) == (14, 0, 0, 14)


def test_changed_scores_are_counted_with_the_means_and_the_first_are_shown(dump):
    dump()
    found = run("reward", "generous", shown=2)
    assert (found.changed, found.facts["equal"]) == (4, 3)
    assert (found.facts["flipped_up"], found.facts["flipped_down"]) == (4, 0)
    assert (found.facts["mean_recorded"], found.facts["mean_new"]) == (pytest.approx(3 / 7), 1.0)
    assert [change["sample"] for change in found.facts["changes"]] == [1, 3]
    assert "What is 1?" in found.facts["changes"][0]["prompt"]


def test_the_threshold_says_what_counts_as_a_flip(dump):
    dump()
    assert run("reward", "own", threshold=0.2, settings={"bonus": 0.3}).facts["flipped_up"] == 4
    found = run("reward", "own", threshold=0.2, settings={"bonus": 0.1})
    assert (found.facts["flipped_up"], found.facts["flipped_down"]) == (0, 3)


def test_of_a_dict_the_reward_key_of_the_recorded_run_counts(dump):
    dump(reward_key="right")
    assert run("reward", "several").facts["mean_new"] == 1.0
    dump()
    found = run("reward", "several")
    assert found.failed == 7
    assert "reward_key" in found.failures[0]["message"]
    assert run("reward", "several", settings={"reward_key": "length"}).facts["mean_new"] == 4.0


def test_a_call_that_raises_or_returns_no_number_is_named_with_its_sample_and_the_users_frames(dump):
    dump()
    found = run("reward", "broken")
    assert found.failed == 2
    raised, garbage = found.failures
    assert (raised["what"], raised["kind"]) == ("sample 2 (rollout 0)", "KeyError")
    assert [frame.split(" in ")[1].partition(":")[0] for frame in raised["frames"]] == ["broken", "helper"]
    assert garbage["kind"] == HookResultError.__name__
    assert "None" in garbage["message"]
    assert garbage["frames"] == []


def test_samples_with_a_reward_hook_of_their_own_are_left_out(dump):
    dump(RecordedRollout(0, "1", False, [RecordedGroup([sample(0, 0, 1.0), sample(1, 0, 1.0, custom_rm_path="x:y")])]))
    found = run("reward", "same")
    assert (found.calls, found.skipped) == (1, {"samples with a reward hook of their own": 1})


def test_a_group_reward_is_called_by_group_with_unscored_samples(dump):
    dump(rollout(), evaluation())
    found = run("group_reward", "group")
    assert (found.calls, found.failed) == (3, 0)
    assert found.facts["groups_changed"] == 3
    assert list(found.skipped.values()) == [1]
    wrong = run("group_reward", "short")
    assert "1 rewards for the 2 samples of group 0" in wrong.failures[0]["message"]


# Whole rollouts


def test_post_processing_is_compared_with_what_was_recorded(dump):
    dump()
    found = run("reward_post_process", "halved")
    assert found.facts["differ"] == {"raw_rewards": 0, "rewards": 1}
    assert found.facts["largest_difference"]["rewards"] == 0.5
    assert [group["group"] for group in found.facts["groups"]] == [0]


def test_a_filter_judges_kept_and_dropped_groups(dump):
    dump(rollout(), evaluation())
    found = run("dynamic_filter", "verdict")
    assert found.facts["counts"] == {"kept → dropped": 1, "kept → kept": 1, "dropped → kept": 1}
    assert [(change["group"], change["reason"]) for change in found.facts["changes"]] == [(0, None), (2, "zero_std")]


def test_a_sample_filter_flips_flags_and_starts_from_clear_ones_if_one_had_run(dump):
    dump()
    found = run("sample_filter", "mark")
    assert (found.facts["samples"], found.facts["removed_new"], found.facts["flipped"]) == (5, 2, 2)
    record = rollout()
    for item in (record.groups[0].samples[0], record.groups[0].samples[1]):
        item.remove_sample = True
    dump(record, rollout_sample_filter_path="x:y")
    assert run("sample_filter", "mark").facts["flipped"] == 2
    assert "take them out" in run("sample_filter", "takes_out").failures[0]["message"]


def test_a_look_at_all_samples_says_what_it_changed_and_has_no_data_source(dump):
    dump()
    assert run("all_samples_process", "look").facts["fields"] == {"metadata": 1, "mine": 1}
    assert "a dump holds no data source" in run("all_samples_process", "asks").failures[0]["message"]


def test_converted_columns_are_checked_and_described(dump):
    dump()
    found = run("convert_samples", "convert")
    assert found.failed == 0
    assert "round_number" in found.facts["beyond_the_contract"]
    if found.facts["compared_with_default"]:
        assert found.facts["differ"] == {"round_number": 5}
    wrong = run("convert_samples", "half_converted")
    assert "column 'rewards' has 4 entries for 5 samples" in wrong.failures[0]["message"]


# Options


def test_args_are_the_recorded_runs_with_changes_over_them(dump):
    dump(rollout_temperature=0.7)
    assert run("reward", "by_option").facts["mean_new"] == pytest.approx(0.7)
    assert run("reward", "by_option", settings={"rollout_temperature": 0.5}).facts["mean_new"] == 0.5
    with pytest.raises(ConfigError, match="rollout_temperature = 0"):
        run("reward", "by_option", settings={"rollout_temperature": 0})
    with pytest.raises(ConfigError, match="did you mean 'rollout_temperature'"):
        run("reward", "by_option", settings={"rollout_temprature": 1.0})


def test_a_hook_has_its_own_options_from_the_dump_from_set_or_by_default(dump):
    dump()
    assert run("reward", "own").facts["mean_new"] == 0.25
    dump(bonus=0.5)
    assert run("reward", "own").facts["mean_new"] == 0.5
    assert run("reward", "own", settings={"bonus": 1}).facts["mean_new"] == 1.0
    # Another hook of the recorded run brought it: there is no type to check.
    assert run("reward", "same", settings={"bonus": "much"}).failed == 0


def test_what_a_dump_says_nothing_of_has_its_documented_default_and_can_be_set(dump, tmp_path, monkeypatch):
    groups = {name: kind for name, kind in option_groups().items() if kind.__module__.startswith("miles_api.")}
    monkeypatch.setattr("miles_api.replay.options.option_groups", lambda: groups)
    with DumpWriter("run.mdump", DumpHeader(config={})) as writer:
        writer.write(rollout())
    (tmp_path / "mine.py").write_text(
        "def length(args, sample):\n    assert args.apply_chat_template_kwargs == {}\n"
        "    return args.rollout_max_response_len\n" + HOOKS
    )
    assert run("reward", "length").facts["mean_new"] == 1024
    assert run("reward", "length", settings={"rollout_max_response_len": 8}).facts["mean_new"] == 8
    assert run("reward", "several", settings={"reward_key": "length"}).facts["mean_new"] == 4.0
    with pytest.raises(ConfigError, match="did you mean 'reward_key'"):
        run("reward", "several", settings={"reward_kye": "length"})
    with pytest.raises(ConfigError, match="rollout_max_response_len"):
        run("reward", "length", settings={"rollout_max_response_len": "many"})


def test_an_option_that_follows_from_others_is_what_the_recorded_run_says(dump, tmp_path):
    (tmp_path / "mine.py").write_text("def engines(args, sample):\n    return args.rollout_num_gpus\n")
    dump(rollout_num_engines=3, rollout_num_gpus=3)
    assert run("reward", "engines").facts["mean_new"] == 3


def test_without_a_reference_the_recorded_runs_own_is_taken(dump, tmp_path):
    dump(custom_rm_path=str(tmp_path / "mine.py") + ":generous")
    found = replay(Request(hook="reward", dump="run.mdump"), lambda done, bad: None)
    assert found.changed == 4
    dump()
    with pytest.raises(ConfigError, match="named no reward hook"):
        replay(Request(hook="reward", dump="run.mdump"), lambda done, bad: None)


# Calls


@pytest.mark.parametrize(
    ("function", "workers"), [("hangs", 0), ("hangs_async", 0), ("hangs", 1), ("spins", 2)], ids=str
)
def test_a_call_that_hangs_is_given_up_and_the_others_go_on(dump, function, workers):
    dump()
    found = run("reward", function, timeout=0.6, workers=workers)
    assert (found.calls, found.failed) == (7, 1)
    assert found.failures[0]["what"] == "sample 1 (rollout 0)"
    assert "ran past --timeout 0.6 s" in found.failures[0]["message"]


def test_what_a_process_said_before_it_died_counts_however_late_it_is_read(dump, monkeypatch):
    def when_it_is_dead(connections, timeout):
        time.sleep(0.3)
        return wait(connections, timeout)

    dump()
    monkeypatch.setattr(workers_module, "wait", when_it_is_dead)
    found = run("reward", "dies", workers=1)
    assert (found.calls, found.failed, found.facts["equal"]) == (7, 1, 3)


def test_a_process_that_dies_costs_one_call(dump):
    dump()
    found = run("reward", "dies", workers=1)
    assert (found.calls, found.failed, found.facts["equal"]) == (7, 1, 3)
    assert "exit code 7" in found.failures[0]["message"]


def test_a_hook_that_cancels_itself_has_failed(dump):
    dump()
    assert run("reward", "cancels_itself").failed == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_is_built_once_a_process_called_on_one_loop_and_closed(dump, capfd, workers):
    dump()
    found = run("reward", "Scorer", workers=workers)
    assert (found.failed, found.facts["mean_new"]) == (0, 42.0)
    counts = [int(line.split()[2]) for line in capfd.readouterr().err.splitlines() if line.startswith("closed")]
    assert sum(counts) == 7
    assert len(counts) <= max(workers, 1)


def test_processes_come_to_the_same_result(dump):
    dump(rollout(0), rollout(1))
    here, there = run("reward", "generous"), run("reward", "generous", workers=2)
    assert here.facts == there.facts
    assert run("dynamic_filter", "verdict", workers=1).facts == run("dynamic_filter", "verdict").facts
    assert run("sample_filter", "mark", workers=1).facts == run("sample_filter", "mark").facts


def test_a_limit_bounds_the_calls(dump):
    dump(rollout(0), rollout(1))
    assert run("reward", "generous", limit=9).calls == 9


# What is refused


def test_every_hook_is_replayed_refused_with_a_reason_or_trained():
    trained = {"advantage", "importance_weights", "pg_loss_reducer", "rollout_data_postprocess"}
    assert {*REPLAYERS, *REFUSED, *trained} == set(REGISTRY)
    assert not set(REPLAYERS) & set(REFUSED)


def test_a_hook_that_cannot_be_replayed_is_refused_with_what_to_do_instead(dump):
    dump()
    with pytest.raises(ConfigError, match="miles hooks check REF --as generate --call"):
        run("generate", "same")


def test_a_dump_of_the_other_kind_or_without_anything_for_the_hook_is_refused(dump):
    dump(evaluation())
    with pytest.raises(DataError, match="holds nothing for a dynamic_filter hook"):
        run("dynamic_filter", "verdict")
    with pytest.raises(ConfigError, match="--save-debug-train-data"):
        run("advantage", "same")
    dump(RecordedTrainBatch(0, {"tokens": [[1]]}), kind="train")
    with pytest.raises(ConfigError, match="--save-debug-rollout-data"):
        run("reward", "same")


# The trainer's hooks


def test_a_hook_of_the_trainer_is_replayed_by_what_the_trainers_package_offers(dump, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("def change(args, rollout_data):\n    pass\n")
    dump(RecordedTrainBatch(3, {"rewards": [1.0]}), RecordedTrainBatch(4, {"rewards": [2.0]}), kind="train")

    def advantage(hook, args, record):
        if record.rollout_id == 4:
            raise HookResultError("advantages are missing")
        return {"advantages: samples changed": record.columns["rewards"][0]}

    monkeypatch.setattr(train_module, "entry_points", lambda group: {"train": []})
    monkeypatch.setattr(train_module, "provider", lambda group, name: {"advantage": advantage})
    found = run("advantage", "change")
    assert (found.calls, found.changed, found.failed) == (2, 1, 1)
    assert found.facts["batches"] == [{"rollout": 3, "numbers": {"advantages: samples changed": 1.0}}]
    assert found.failures[0]["what"] == "the batch of rollout 4"


def test_without_the_trainers_package_it_says_what_to_install(dump, monkeypatch):
    dump(RecordedTrainBatch(0, {}), kind="train")
    monkeypatch.setattr(train_module, "entry_points", lambda group: {})
    with pytest.raises(ConfigError, match=r"pip install 'miles-train\[megatron\]'"):
        run("advantage", "convert")

    def without_torch(group, name):
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(train_module, "entry_points", lambda group: {"train": []})
    monkeypatch.setattr(train_module, "provider", without_torch)
    with pytest.raises(ConfigError, match="torch"):
        run("advantage", "convert")


# The command


def command(capsys, *words):
    code = main(["hooks", "run", *words, "--samples", "run.mdump"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_fails_when_a_call_fails_and_on_changes_only_if_asked(dump, capsys):
    dump()
    assert command(capsys, "mine.py:generous", "--as", "reward")[0] == 0
    assert command(capsys, "mine.py:generous", "--as", "reward", "--fail-on-change")[0] == 1
    assert command(capsys, "mine.py:same", "--as", "reward", "--fail-on-change")[0] == 0
    code, out, err = command(capsys, "mine.py:broken", "--as", "reward")
    assert code == 1
    assert "2 failed" in out
    assert "sample 2 (rollout 0): KeyError: 'no answer'" in err
    code, _, err = command(capsys, "mine.py:nothing", "--as", "reward")
    assert code == 2
    assert "has no 'nothing'" in err


def test_the_command_says_what_changed_in_words(dump, capsys):
    dump()
    _, out, err = command(capsys, "mine.py:generous", "--as", "reward", "--set", "rollout_temperature=0.5")
    assert "4 of them flipped at 0.5: 4 up, 0 down" in out
    assert "0.4286 → 1.0000" in out
    assert "7 samples in" in out
    assert err == ""


def test_a_change_is_shown_with_the_exact_text_so_that_blanks_are_seen(dump, capsys):
    one = sample(0, 0, 0.0)
    one.prompt, one.response = "a" * 80 + "\n  b", "45 "
    dump(RecordedRollout(0, groups=[RecordedGroup([one])]))
    _, out, _ = command(capsys, "mine.py:generous", "--as", "reward")
    assert "response '45 '" in out
    assert "a\\n  b'" in out
    assert "a" * 70 not in out


def test_one_object_is_printed_whatever_the_hook_prints(dump, capsys):
    dump()
    _, out, err = command(capsys, "mine.py:chatty", "--as", "reward", "--json")
    found = json.loads(out)
    assert (found["calls"], found["changed"], found["facts"]["flipped_down"]) == (7, 3, 3)
    assert "noise" in err


def test_the_undamaged_part_of_a_dump_is_replayed_with_a_warning(dump, capsys, tmp_path):
    dump(rollout(0), rollout(1))
    whole = (tmp_path / "run.mdump").read_bytes()
    (tmp_path / "run.mdump").write_bytes(whole[:-5])
    code, out, err = command(capsys, "mine.py:same", "--as", "reward")
    assert code == 0
    assert "7 samples in" in out
    assert err.startswith("warning: ")


def test_replaying_a_plain_reward_imports_no_torch(dump):
    import subprocess

    dump()
    program = (
        "import sys; from miles_api.cli import main\n"
        "main(['hooks', 'run', 'mine.py:same', '--as', 'reward', '--samples', 'run.mdump'])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0
