import json

import pytest

from miles_api.errors import DataError, HookResultError, MilesError, ServiceError
from miles_api.loading.hookset import HookSet
from miles_rollout.state import State


def test_a_rollout_fills_samples_and_columns(worker, fake_engine):
    engine = fake_engine()
    result = worker(engine, rm_type="f1").generate(0, "1")
    batch = result["batch"]
    assert len(batch["tokens"]) == 6
    assert all(tokens[-2:] == [5, 1] for tokens in batch["tokens"])
    assert batch["rollout_log_probs"] == [[-0.5, -0.5]] * 6
    assert batch["weight_versions"] == [["1"]] * 6
    assert batch["group_indices"] == [0, 0, 0, 1, 1, 1]
    assert result["metrics"]["rollout/samples"] == 6
    paths, payloads = zip(*engine.requests, strict=True)
    assert set(paths) == {"/generate"}
    assert len({p["sampling_params"]["sampling_seed"] for p in payloads}) == 6
    assert payloads[0]["sampling_params"]["temperature"] == 1.0


def test_dropped_groups_are_replaced_by_new_prompts_and_counted(worker, hook):
    reference = hook("def fn(args, samples, **kw):\n    return samples[0].group_index % 2 == 1\n")
    result = worker(dynamic_sampling_filter_path=reference).generate(0, "1")
    assert result["batch"]["group_indices"] == [1, 1, 1, 3, 3, 3]
    assert sum(v for k, v in result["metrics"].items() if k.startswith("rollout/dropped/")) == 2


def test_filters_that_drop_everything_end_the_run(worker, hook):
    reference = hook("def fn(args, samples):\n    return False\n")
    with pytest.raises(MilesError, match=r"dropped \d+ groups in one rollout of 2"):
        worker(dynamic_sampling_filter_path=reference, max_filter_attempts=3).generate(0, "1")


def test_a_reward_hook_that_raises_ends_the_run_with_its_own_exception(worker, hook):
    reference = hook("def fn(args, sample):\n    raise KeyError('no such label')\n")
    with pytest.raises(KeyError, match="no such label"):
        worker(custom_rm_path=reference).generate(0, "1")


@pytest.mark.parametrize("value", ["None", "'good'", "float('nan')", "{'a': None}"])
def test_a_reward_that_is_no_finite_number_names_hook_and_sample(worker, hook, value):
    reference = hook(f"async def fn(args, sample):\n    return {value}\n")
    with pytest.raises(HookResultError, match=r"reward hook .*sample \d"):
        worker(custom_rm_path=reference).generate(0, "1")


def test_a_group_reward_scores_whole_groups(worker, hook):
    reference = hook("def fn(args, samples):\n    return [float(i) for i in range(len(samples))]\n")
    batch = worker(custom_rm_path=reference, group_rm=True).generate(0, "1")["batch"]
    assert batch["raw_reward"] == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]


def test_a_group_reward_of_the_wrong_length_is_an_error(worker, hook):
    reference = hook("def fn(args, samples):\n    return [1.0]\n")
    with pytest.raises(HookResultError, match="3 samples of group"):
        worker(custom_rm_path=reference, group_rm=True).generate(0, "1")


def test_a_generation_may_fan_out_and_set_rewards_itself(worker, hook):
    body = (
        "import copy\n"
        "async def fn(args, sample, sampling_params):\n"
        "    first = copy.copy(sample)\n"
        "    first.tokens = [9]\n"
        "    first.append_response_tokens([3], log_probs=[-1.0])\n"
        "    second = copy.copy(first)\n"
        "    first.reward, second.reward = 1.0, 0.0\n"
        "    return [first, second]\n"
    )
    batch = worker(custom_generate_function_path=hook(body), rm_type=None).generate(0, "1")["batch"]
    assert len(batch["tokens"]) == 12
    assert batch["raw_reward"] == [1.0, 0.0] * 6
    assert batch["rollout_ids"][:4] == [0, 0, 1, 1]


def test_a_rollout_function_replaces_the_loop_and_a_bare_list_is_wrapped(worker, hook):
    body = (
        "def fn(args, rollout_id, data_source, evaluation=False):\n"
        "    groups = data_source.get_samples(args.rollout_batch_size)\n"
        "    for group in groups:\n"
        "        for sample in group:\n"
        "            sample.tokens, sample.response_length, sample.reward = [1, 2], 1, float(rollout_id)\n"
        "    return groups\n"
    )
    assert worker(rollout_function_path=hook(body)).generate(4, "1")["batch"]["raw_reward"] == [4.0] * 6


def test_a_sample_filter_takes_samples_out_of_the_loss_only(worker, hook):
    body = "def fn(args, data):\n    for group in data:\n        group[0].remove_sample = True\n"
    batch = worker(rollout_sample_filter_path=hook(body)).generate(0, "1")["batch"]
    assert batch["loss_masks"] == [[0, 0], [1, 1], [1, 1]] * 2


def test_a_log_hook_that_returns_true_suppresses_the_metrics(worker, hook):
    body = "def fn(rollout_id, args, samples, extra, seconds):\n    return len(samples) == 6\n"
    assert worker(custom_rollout_log_function_path=hook(body)).generate(0, "1")["metrics"] == {}


def test_an_engine_that_refuses_is_quoted(worker, fake_engine):
    engine = fake_engine(lambda payload: (400, {"error": "too long"}))
    with pytest.raises(ServiceError, match=r"answered 400: .*too long"):
        worker(engine).generate(0, "1")


def test_requests_that_were_sent_again_are_counted_once_and_their_samples_are_there_once(
    worker, fake_engine, engine_reply
):
    seen = []

    def answer(payload):
        seen.append(payload)
        return (502, {"error": "worker_lost"}) if len(seen) == 2 else (200, engine_reply([5, 1], "3"))

    running = worker(fake_engine(answer))
    output = running.generate(0, "1")
    assert output["metrics"]["rollout/request_retries"] == 1
    assert len(output["batch"]["tokens"]) == 6
    assert seen.count(seen[1]) == 2
    assert "rollout/request_retries" not in running.generate(1, "1")["metrics"]


def test_an_engine_whose_ids_disagree_with_its_log_probs_is_refused(worker, fake_engine, engine_reply):
    engine = fake_engine(lambda payload: (200, {**engine_reply([5, 1], "3"), "output_ids": [5]}))
    with pytest.raises(ServiceError, match="output_ids and output_token_logprobs differ"):
        worker(engine).generate(0, "1")


def test_a_prompt_longer_than_the_context_is_an_error_that_names_the_flag(worker):
    with pytest.raises(DataError, match="--rollout-max-context-len 3"):
        worker(rollout_max_context_len=3).generate(0, "1")


def test_evaluation_is_greedy_and_leaves_the_training_prompts_alone(worker, fake_engine, prompt_file):
    engine = fake_engine()
    running = worker(engine, eval_prompt_data=prompt_file, n_samples_per_eval_prompt=2)
    metrics = running.evaluate(0, "1")["metrics"]
    assert metrics["eval/prompts/reward"] == pytest.approx(0.2)
    assert len(engine.requests) == 10
    assert {p["sampling_params"]["temperature"] for _, p in engine.requests} == {0.0}
    assert running.generate(0, "1")["batch"]["group_indices"][0] == 0


def test_leftover_groups_of_an_oversampled_rollout_start_anew_in_the_next(worker, hook):
    running = worker(over_sampling_batch_size=4)
    first = running.generate(0, "1")["batch"]
    second = running.generate(1, "1")["batch"]
    assert len(set(first["group_indices"]) & set(second["group_indices"])) == 0
    assert set(second["group_indices"]) <= {0, 1, 2, 3, 4, 5}
    assert {tuple(tokens[-2:]) for tokens in second["tokens"]} == {(5, 1)}
    assert all(tokens.count(1) == 1 for tokens in second["tokens"])
    assert second["response_lengths"] == [2] * 6


def test_an_evaluation_after_an_oversampled_rollout_is_not_told_to_hurry(worker, hook, prompt_file):
    body = (
        "async def fn(input):\n"
        "    input.sample.tokens, input.sample.response_length = [1, 2], 1\n"
        "    input.sample.reward = float(input.state.aborted)\n"
        "    return input.sample\n"
    )
    running = worker(over_sampling_batch_size=4, custom_generate_function_path=hook(body), eval_prompt_data=prompt_file)
    running.generate(0, "1")
    assert running.evaluate(0, "1")["metrics"]["eval/prompts/reward"] == 0.0


def test_samples_of_other_weights_than_those_sent_stop_the_run(worker):
    with pytest.raises(ServiceError, match=r"weights \['1'\], not '2'"):
        worker().generate(0, "2")


def test_group_rm_without_a_hook_scores_sample_by_sample(worker):
    batch = worker(group_rm=True, rm_type="f1").generate(0, "1")["batch"]
    assert batch["raw_reward"] == [0.0] * 6


def test_what_a_hook_writes_to_args_changes_nothing_else(worker, hook):
    body = "def fn(args, sample):\n    args.rollout_batch_size = 5\n    return 1.0\n"
    running = worker(custom_rm_path=hook(body))
    assert [len(running.generate(i, "1")["batch"]["tokens"]) for i in range(2)] == [6, 6]
    (reward,) = [h for h in running.report() if h["hook"] == "reward"]
    assert reward["args_written"] == ["rollout_batch_size"]


def test_samples_without_identity_are_numbered_by_position(worker, hook):
    body = (
        "from miles_api import Sample\n"
        "def one(reward):\n    return Sample(tokens=[1, 2], response_length=1, reward=reward)\n"
        "def fn(args, rollout_id, data_source, evaluation=False):\n"
        "    return [[one(0.0), one(1.0)], [one(10.0), [one(11.0), one(12.0)]]]\n"
    )
    batch = worker(rollout_function_path=hook(body)).generate(0, "1")["batch"]
    assert batch["group_indices"] == [0, 0, 1, 1, 1]
    assert batch["sample_indices"] == [0, 1, 2, 3, 4]
    assert batch["rollout_ids"] == [0, 1, 2, 3, 3]
    assert batch["rewards"][0] < 0 < batch["rewards"][1]


def test_a_rollout_that_numbers_only_some_samples_is_refused(worker, hook):
    body = (
        "from miles_api import Sample\n"
        "def fn(args, rollout_id, data_source, evaluation=False):\n"
        "    some = [Sample(tokens=[1, 2], response_length=1, reward=0.0, group_index=g) for g in (None, 1, 2)]\n"
        "    return [some[:2], some[2:]]\n"
    )
    with pytest.raises(HookResultError, match="1 of 3 samples without group_index"):
        worker(rollout_function_path=hook(body)).generate(0, "1")


def test_a_prompt_that_fills_the_context_gives_an_empty_truncated_sample(worker):
    batch = worker(rollout_max_context_len=6).generate(0, "1")["batch"]
    assert batch["response_lengths"] == [0] * 6
    assert batch["truncated"] == [1] * 6


def test_a_data_source_that_runs_dry_is_an_error(worker, hook):
    body = (
        "class Source:\n"
        "    def __init__(self, args): ...\n"
        "    def get_samples(self, n):\n        return []\n"
        "    def add_samples(self, samples): ...\n"
        "    def save(self, rollout_id): ...\n"
        "    def load(self, rollout_id=None): ...\n"
    )
    with pytest.raises(DataError, match="handed out no group"):
        worker(data_source_path=hook(body, "Source")).generate(0, "1")


def test_a_dict_reward_without_a_key_names_the_flag_in_evaluation_too(worker, hook, prompt_file):
    reference = hook("def fn(args, sample):\n    return {'a': 1.0}\n")
    running = worker(custom_rm_path=reference, eval_prompt_data=prompt_file)
    with pytest.raises(HookResultError, match="--reward-key"):
        running.evaluate(0, "1")
    keyed = worker(custom_rm_path=reference, eval_prompt_data=prompt_file, eval_reward_key="a")
    assert keyed.evaluate(0, "1")["metrics"]["eval/prompts/reward"] == 1.0


def test_every_hook_that_ran_is_reported_with_its_calls(worker, hook):
    reference = hook("def fn(args, sample):\n    return 1.0\n")
    running = worker(custom_rm_path=reference)
    running.generate(0, "1")
    calls = {(h["hook"], h["reference"]): h["calls"] for h in running.report()}
    assert len(calls) == len(running.report())
    assert calls["reward", reference] == 6
    assert calls["generate", "default"] == 6
    assert calls["rollout", "default"] == 1


def test_supervised_rollouts_read_labels_and_ask_no_engine(worker, fake_engine):
    engine = fake_engine()
    running = worker(engine, rollout_function_path="sft", n_samples_per_prompt=1, loss_type="sft_loss")
    result = running.generate(0, "0")
    batch = result["batch"]
    assert [name for name in result["metrics"] if "reward" in name or "equal" in name] == []
    assert batch["response_lengths"] == [2, 2]
    assert [tokens[-1] for tokens in batch["tokens"]] == [1, 1]
    assert engine.requests == []


def test_a_supervised_label_must_be_text(worker, tmp_path):
    file = tmp_path / "numbers.jsonl"
    file.write_text(json.dumps({"prompt": "x", "label": 3}))
    with pytest.raises(DataError, match="needs a text label, got 3"):
        worker(rollout_function_path="sft", prompt_data=str(file)).generate(0, "0")


def test_a_sample_index_alone_decides_the_sampling_seed():
    from miles_rollout.generate.single_turn import sampling_seed

    assert sampling_seed(1, 2, 0) == sampling_seed(1, 2, 0)
    assert len({sampling_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27


def test_a_router_token_goes_along_with_every_request(configure):
    args = configure(router_token="sesame").args
    args.sglang_router_ip, args.sglang_router_port = "127.0.0.1", 1
    assert State(args, HookSet(args, [])).requests.headers["Authorization"] == "Bearer sesame"
