import random
import re
import socket

import msgspec
import pytest

from miles_api.cli import main
from miles_api.errors import ConfigError, DataError, ServiceError
from miles_api.record import read_dump
from miles_api.testing import make_sample
from miles_rollout.shown import shown_samples


@pytest.fixture
def recording(worker, hook, tmp_path, prompt_file):
    """Record rollouts 0 to 2, each with two groups dropped, and one evaluation."""
    path = tmp_path / "dumps" / "run.mdump"
    running = worker(
        save_debug_rollout_data=str(path),
        custom_rm_path=hook("def fn(args, sample):\n    return float(sample.index % 3)\n"),
        rm_type=None,
        dynamic_sampling_filter_path=hook("def fn(args, samples):\n    return samples[0].group_index % 2 == 1\n"),
        rollout_sample_filter_path=hook("def fn(args, data):\n    data[0][0].remove_sample = True\n"),
        eval_prompt_data=prompt_file,
        router_token="sesame",
    )
    results = [running.generate(i, "1") for i in range(2)]
    running.evaluate(1, "1")
    results.append(running.generate(2, "1"))
    return path, results


REPLAY = {"rollout_function_path": "recorded", "prompt_data": None, "rm_type": None, "url": ""}


def test_a_recording_holds_kept_and_dropped_groups_rewards_metrics_and_evaluations(recording):
    path, results = recording
    records = list(read_dump(path))
    assert [(r.rollout_id, r.evaluation) for r in records] == [(0, False), (1, False), (1, True), (2, False)]
    first = records[0]
    kept = [group for group in first.groups if group.dropped is None]
    assert [group.samples[0].group_index for group in kept] == [1, 3]
    assert len(first.groups) == 4
    assert all(group.dropped.endswith(":fn") for group in first.groups if group not in kept)
    assert kept[0].samples[0].remove_sample
    assert first.raw_rewards == results[0]["batch"]["raw_reward"]
    assert first.rewards == results[0]["batch"]["rewards"]
    assert first.metrics["rollout/reward"] == 1.0
    assert first.weight_version == "1"
    assert records[2].metrics["eval/prompts/reward"] == pytest.approx(0.8)


def test_a_recording_says_which_options_it_was_made_with_but_no_secret(recording):
    path, _ = recording
    header = read_dump(path).header
    assert header.kind == "rollout"
    assert header.config["rollout_batch_size"] == 2
    assert "router_token" not in header.config
    assert b"sesame" not in path.read_bytes()


def without_hooks(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("hooks/")}


def test_recorded_rollouts_give_the_same_columns_without_engine_prompts_or_filters(recording, worker, hook):
    path, results = recording
    fails = hook("def fn(args, data):\n    raise AssertionError('filters ran when it was recorded')\n")
    running = worker(load_debug_rollout_data=str(path), rollout_sample_filter_path=fails, **REPLAY)
    for rollout_id, version in ((0, "7"), (2, "9"), (1, "8")):
        again = running.generate(rollout_id, version)
        assert again["batch"] == results[rollout_id]["batch"]
        assert without_hooks(again["metrics"]) == without_hooks(results[rollout_id]["metrics"])


def test_a_run_on_recorded_rollouts_that_is_resumed_draws_on_where_it_was(recording, worker, tmp_path):
    replay = {"load_debug_rollout_data": str(recording[0]), **REPLAY}
    worker(**replay).save(1, str(tmp_path))
    expected = random.random()
    worker(**replay).load(1, str(tmp_path))
    assert random.random() == expected


def test_post_processing_and_conversion_run_again_on_recorded_rollouts(recording, worker, hook):
    path, _ = recording
    changed = hook("def fn(args, samples):\n    return [9.0] * len(samples), [0.5] * len(samples)\n")
    running = worker(load_debug_rollout_data=str(path), custom_reward_post_process_path=changed, **REPLAY)
    batch = running.generate(0, "1")["batch"]
    assert (batch["raw_reward"], batch["rewards"]) == ([9.0] * 6, [0.5] * 6)


def test_running_past_the_end_of_a_recording_says_what_it_holds(recording, worker, tmp_path):
    path, _ = recording
    running = worker(load_debug_rollout_data=str(path), **REPLAY)
    with pytest.raises(DataError, match=r"holds 3 rollouts \(0 to 2\), and not rollout 3"):
        running.generate(3, "1")
    cut = tmp_path / "cut.mdump"
    cut.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"holds 2 rollouts \(0 to 1\), and not rollout 2; it is damaged: "):
        worker(load_debug_rollout_data=str(cut), **REPLAY).generate(2, "1")


def test_recorded_rollouts_cannot_be_evaluated(recording, worker):
    with pytest.raises(ConfigError, match="no engine runs"):
        worker(load_debug_rollout_data=str(recording[0]), **REPLAY).evaluate(0, "1")


def test_a_resumed_run_records_each_rollout_once(recording, worker, hook, tmp_path):
    path, _ = recording
    worker().save(1, str(tmp_path))
    running = worker(
        save_debug_rollout_data=str(path), rm_type=None, custom_rm_path=hook("def fn(args, sample):\n    return 4.0\n")
    )
    running.load(1, str(tmp_path))
    running.generate(2, "1")
    assert [record.rollout_id for record in read_dump(path) if not record.evaluation] == [0, 1, 2]
    replay = worker(load_debug_rollout_data=str(path), **REPLAY)
    assert replay.generate(2, "1")["batch"]["raw_reward"] == [4.0] * 6
    assert replay.generate(1, "1")["batch"]["raw_reward"] != [4.0] * 6


def test_a_rollout_whose_conversion_fails_is_recorded_as_it_was_before(worker, hook, tmp_path):
    body = "def fn(args, samples, **rewards):\n    samples[0].reward = 99.0\n    raise KeyError('mine')\n"
    path = tmp_path / "run.mdump"
    running = worker(save_debug_rollout_data=str(path), custom_convert_samples_to_train_data_path=hook(body))
    with pytest.raises(KeyError, match="mine"):
        running.generate(0, "1")
    (record,) = read_dump(path)
    assert record.groups[0].samples[0].reward == 0.0
    assert record.rewards == [0.0] * 6


def test_the_command_that_replays_what_a_default_hook_failed_on_can_be_run(worker, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    running = worker(rm_type="remote_rm", rm_url=url, rm_url_timeout=0.1, hook_retries=0, hook_error_budget="0")
    with pytest.raises(ServiceError) as caught:
        running.generate(0, "1")
    [command] = re.findall(r"replay with: miles (.+?)\)", str(caught.value))
    assert main(command.split()) == 1
    assert "gave no score within --rm-url-timeout" in "".join(capsys.readouterr())


def test_which_engine_answered_is_not_recorded_and_stays_known_to_the_run(worker, fake_engine, tmp_path):
    engine = fake_engine()
    engine.headers["x-miles-engine"] = "10.0.0.7:3000"
    path = tmp_path / "rollouts.mdump"
    rollouts = worker(engine, rm_type="f1", save_debug_rollout_data=str(path))
    assert rollouts.generate(0, "1")["batch"]["engines"] == [["10.0.0.7:3000"]] * 6
    [record] = read_dump(path)
    assert [sample.engines for group in record.groups for sample in group.samples] == [[]] * 6


def test_the_sample_browser_gets_metadata_whatever_it_holds_and_however_long_it_is():
    loop: list[object] = []
    loop.append(loop)
    metadata = {"a": 1, "set": {1}, "nan": float("nan"), "odd": {(1, 2): 3}, "big": 1 << 70, 5: "key", "loop": loop}
    long = {"text": "x" * 5000, "tests": ["é" * 100] * 100, "odd": {(1, 2): "y" * 5000}}
    first, second, third = (make_sample(index=i, metadata=m) for i, m in enumerate((metadata, long, {})))
    one, two = (shown["metadata"] for shown in shown_samples([[first, second], [third]], 1))
    msgspec.json.encode(one)
    assert (one["a"], one["set"], one["nan"], one["odd"], one["5"]) == (1, [1], None, {"(1, 2)": 3}, "key")
    assert (one["big"], one["loop"]) == (1 << 70, "[[...]]")
    assert two["text"] == "x" * 2000 + " … (5,000 characters)"
    assert all(len(text) < 2100 for text in two.values())
    assert first.metadata is metadata
