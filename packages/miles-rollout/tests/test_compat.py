"""Hooks of older stacks in a running rollout: the state, requests and rewards that they import."""

import asyncio

import pytest

from miles_api.errors import ServiceError
from miles_rollout import running
from miles_rollout.compat.http import post

GENERATE = """
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def generate(args, sample: Sample, sampling_params, evaluation=False) -> Sample:
    assert not args.partial_rollout
    state = GenerateState(args)
    assert state is GenerateState(args) and state.args is not None
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    params = dict(state.sampling_params, **sampling_params)
    output = await post(url, {"input_ids": ids, "sampling_params": params, "return_logprob": True})
    new = [(item[1], item[0]) for item in output["meta_info"]["output_token_logprobs"]]
    sample.tokens = ids + [token for token, _ in new]
    sample.response_length = len(new)
    sample.response = output["text"]
    sample.rollout_log_probs = [log_prob for _, log_prob in new]
    sample.update_from_meta_info(args, output["meta_info"])
    return sample
"""

WRAPPER = """
from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput
from miles.rollout.generate_hub.single_turn import generate as base
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample, compute_request_payload, update_sample_from_response,
)
from miles.utils.http_utils import post


async def by_steps(input: GenerateFnInput) -> GenerateFnOutput:
    sample, args = input.sample, input.args
    ids = compute_prompt_ids_from_sample(input.state, sample)
    payload, halt = compute_request_payload(args, ids, input.sampling_params)
    assert halt is None
    output = await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload)
    await update_sample_from_response(args, sample, payload=payload, output=output, update_loss_mask=True)
    return GenerateFnOutput(sample)


async def by_base(input: GenerateFnInput) -> GenerateFnOutput:
    output = await base(input)
    output.samples.metadata["wrapped"] = True
    return output
"""

OWN_LOOP = """
import asyncio
import threading

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.sglang_rollout import GenerateState, generate_and_rm_group
from slime.utils.async_utils import run


class Worker:
    def __init__(self, args, data_buffer):
        self.args, self.data_buffer, self.groups = args, data_buffer, []
        self.state = GenerateState(args)

    async def loop(self):
        for group in self.data_buffer.get_samples(self.args.rollout_batch_size):
            params = dict(self.state.sampling_params, temperature=0.25)
            self.groups.append(await generate_and_rm_group(self.args, group, sampling_params=params, evaluation=False))


def in_a_thread(args, rollout_id, data_buffer, evaluation=False):
    assert args.rollout_global_dataset and not evaluation
    worker = Worker(args, data_buffer)
    thread = threading.Thread(target=lambda: asyncio.run(worker.loop()))
    thread.start()
    thread.join()
    return worker.groups


def in_the_background(args, rollout_id, data_source, *, evaluation=False):
    async def collect():
        state = GenerateState(args)
        state.submit_generate_tasks(data_source.get_samples(args.rollout_batch_size))
        assert state.remaining_batch_size == args.rollout_batch_size
        async with state.semaphore:
            groups = await asyncio.gather(*state.pendings)
        state.reset()
        return RolloutFnTrainOutput(groups, None)

    return run(collect())
"""

AROUND_THE_DEFAULT = """
from miles.rollout.sglang_rollout import generate_rollout


def around(args, rollout_id, data_source, evaluation=False):
    output = generate_rollout(args, rollout_id, data_source, evaluation=evaluation)
    output.metrics["mine"] = 1.0
    return output
"""


def test_a_generate_hook_of_slime_reaches_tokenizer_and_router(worker, fake_engine, hook):
    engine = fake_engine()
    batch = worker(engine, custom_generate_function_path=hook(GENERATE, "generate")).generate(0, "1")["batch"]
    assert all(tokens[-2:] == [5, 1] for tokens in batch["tokens"])
    assert batch["rollout_log_probs"] == [[-0.5, -0.5]] * 6
    assert {path for path, _ in engine.requests} == {"/generate"}


@pytest.mark.parametrize("name", ["by_steps", "by_base"])
def test_a_generate_hook_of_miles_builds_on_the_parts_of_the_default(worker, hook, name):
    batch = worker(custom_generate_function_path=hook(WRAPPER, name)).generate(0, "1")["batch"]
    assert all(tokens[-2:] == [5, 1] for tokens in batch["tokens"])
    assert batch["loss_masks"] == [[1, 1]] * 6


@pytest.mark.parametrize("name", ["in_a_thread", "in_the_background"])
def test_a_rollout_function_with_event_loops_of_its_own_generates_and_scores(worker, fake_engine, hook, name):
    engine = fake_engine()
    running_one = worker(engine, rollout_function_path=hook(OWN_LOOP, name), rm_type="random")
    for rollout_id in range(2):
        result = running_one.generate(rollout_id, "1")
        assert len(result["batch"]["tokens"]) == 6
        assert set(result["batch"]["raw_reward"]) <= {0.0, 1.0}
    temperatures = {payload["sampling_params"]["temperature"] for _, payload in engine.requests}
    assert temperatures == ({0.25} if name == "in_a_thread" else {1.0})


def test_the_next_run_in_a_process_has_a_state_of_its_own(worker, fake_engine, hook):
    reference = hook(OWN_LOOP, "in_the_background")
    for _ in range(2):
        engine = fake_engine()
        worker(engine, rollout_function_path=reference, rm_type="random").generate(0, "1")
        assert len(engine.requests) == 6
        engine.close()


def test_a_rollout_function_may_build_on_the_default_rollout(worker, hook):
    result = worker(rollout_function_path=hook(AROUND_THE_DEFAULT, "around")).generate(0, "1")
    assert (len(result["batch"]["tokens"]), result["metrics"]["mine"]) == (6, 1.0)


def test_default_paths_of_older_stacks_run_our_defaults(worker):
    result = worker(
        rollout_function_path="miles.rollout.sglang_rollout.generate_rollout",
        eval_function_path="miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn",
        data_source_path="slime.rollout.data_source.RolloutDataSourceWithBuffer",
        buffer_filter_path="miles.rollout.data_source.pop_first",
        custom_generate_function_path="miles.rollout.generate_hub.single_turn.generate",
        dynamic_sampling_filter_path="slime.rollout.filter_hub.dynamic_sampling_filters.check_no_aborted",
    ).generate(0, "1")
    assert len(result["batch"]["tokens"]) == 6


def test_a_reward_of_an_older_stack_may_ask_for_another_one(worker, hook):
    body = (
        "from slime.rollout.rm_hub import async_rm, batched_async_rm\n"
        "from slime.rollout.rm_hub.math_dapo_utils import compute_score\n"
        "async def generate(args, sample, sampling_params):\n"
        "    sample.tokens, sample.response, sample.response_length = [2, 3], 'Answer: 1', 1\n"
        "    sample.status = sample.Status.COMPLETED\n"
        "    assert await async_rm(args, sample) == compute_score(sample.response, sample.label)['score']\n"
        "    await batched_async_rm(args, [sample], inplace_set_reward_field=True)\n"
        "    return sample\n"
        "async def reward(args, sample, **kwargs):\n"
        "    return compute_score(sample.response, sample.label)['score']\n"
    )
    result = worker(
        custom_generate_function_path=hook(body, "generate"), custom_rm_path=hook(body, "reward"), rm_type=None
    ).generate(0, "1")
    assert result["batch"]["raw_reward"] == [-1.0] * 3 + [1.0] * 3


def test_a_data_source_built_on_the_default_one_uses_the_older_names(worker, hook):
    body = (
        "from slime.rollout.data_source import DataSource, RolloutDataSourceWithBuffer\n"
        "class Source(RolloutDataSourceWithBuffer):\n"
        "    def get_samples(self, num_samples):\n"
        "        assert isinstance(self, DataSource) and len(self) == 5 and self.args.rollout_batch_size == 2\n"
        "        assert (self.epoch_id, self.sample_offset, self.sample_group_index) == (0, 0, 0)\n"
        "        groups = super().get_samples(num_samples)\n"
        "        self.update_metadata({'seen': self.sample_index})\n"
        "        self.buffer.extend(groups[:0])\n"
        "        return groups\n"
    )
    started = worker(data_source_path=hook(body, "Source"))
    assert len(started.generate(0, "1")["batch"]["tokens"]) == 6


def test_a_data_source_without_a_buffer_refuses_groups(args_of):
    from miles_rollout.compat.data import RolloutDataSource

    source = RolloutDataSource(args_of())
    assert len(source.get_samples(2)) == 2
    with pytest.raises(RuntimeError, match="takes no groups back"):
        source.add_samples([[]])


def test_the_routers_token_goes_to_the_router_and_to_nobody_else(args_of, fake_engine, monkeypatch):
    from miles_api import Args

    router, other = fake_engine(), fake_engine()
    address, port = router.url.removeprefix("http://").split(":")
    where = {"sglang_router_ip": address, "sglang_router_port": int(port), "router_token": "secret"}
    monkeypatch.setattr(running, "_latest", {})
    running.announce(Args({**{name: getattr(args_of(), name) for name in args_of()}, **where}))
    from miles_rollout.compat import http

    assert http._authorization(f"{router.url}/generate") == {"Authorization": "Bearer secret"}
    assert http._authorization(f"{other.url}/generate") == {}
    assert http._authorization(f"{router.url}9/generate") == {}
    assert asyncio.run(post(f"{router.url}/generate", {"input_ids": [1]}))["output_ids"] == [5, 1]


def test_a_request_is_tried_again_when_the_server_is_busy_and_not_when_it_refuses(fake_engine, monkeypatch):
    monkeypatch.setattr("miles_rollout.compat.http._PAUSE", 0.0)
    busy = iter([503, 503, 200])
    engine = fake_engine(lambda payload: (next(busy), {"ok": True}))
    assert asyncio.run(post(f"{engine.url}/generate", {})) == {"ok": True}
    assert len(engine.requests) == 3
    refusing = fake_engine(lambda payload: (400, {"message": "no such thing"}))
    with pytest.raises(ServiceError, match=r"answered 400.*no such thing"):
        asyncio.run(post(f"{refusing.url}/generate", {}))
    assert len(refusing.requests) == 1
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        asyncio.run(post("http://127.0.0.1:9/generate", {}, max_retries=2))


@pytest.mark.parametrize(
    ("response", "label", "score"),
    [
        ("so\nAnswer: 1/2", "1/2", 1.0),
        ("Answer: $\\frac{1}{2}$", "0.5", 1.0),
        ("Answer: \\boxed{A}", "A", 1.0),
        ("Answer: 12 or 3", "3", -1.0),
        ("the answer is 3", "3", -1.0),
        ("Answer: 4\nAnswer: 3", 3, 1.0),
    ],
)
def test_dapo_scores_labels_of_any_kind(response, label, score):
    from miles_rollout.compat.rewards import compute_score

    found = compute_score(response, label)
    assert (found["score"], found["acc"]) == (score, score > 0)


def test_graders_of_older_stacks_say_right_or_wrong():
    from miles_rollout.compat.rewards import (
        compute_gpqa_reward,
        compute_ifbench_reward,
        compute_score,
        extract_answer,
        f1_score,
        get_deepscaler_rule_based_reward,
        grade_answer_verl,
        remove_boxed,
    )

    assert grade_answer_verl("thus \\boxed{0.5}", "\\boxed{\\frac{1}{2}}")
    assert not grade_answer_verl("thus 0.5", "0.5")
    assert not grade_answer_verl("\\boxed{1}", "")
    assert extract_answer("\\boxed{a} \\boxed{{b}}") == "{b}"
    assert remove_boxed(None) is None
    assert f1_score("the cat sat", "a cat") == (2 / 3, 1 / 2, 1.0)
    assert f1_score("yes indeed", "yes") == (0.0, 0.0, 0.0)
    assert compute_score("\\boxed{3}", "3", strict_box_verify=True)["score"] == 1.0
    assert [compute_gpqa_reward(said, "B") for said in ("Answer: B", None)] == [1.0, 0.0]
    assert get_deepscaler_rule_based_reward("</think>\\boxed{1+x}", "x+1") == 1.0
    followed = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert [compute_ifbench_reward(said, "", followed) for said in ("fine", "not, so")] == [1.0, 0.0]


def test_a_processor_is_none_where_the_model_has_none(tokenizer_dir):
    from miles_rollout.compat.loading import load_processor, load_tokenizer
    from miles_rollout.tokenizers import load_tokenizer as ours

    assert load_processor(tokenizer_dir, trust_remote_code=True) is None
    assert load_tokenizer(tokenizer_dir, trust_remote_code=True) is ours(tokenizer_dir)
