"""Hooks that change what they are given, return what never runs, or fail in odd ways."""

import asyncio
import json
import sys
import textwrap

import msgspec
import pytest

from miles_api.errors import ConfigError, HookResultError
from miles_rollout.budget import ErrorBudget
from miles_rollout.data_source import RolloutDataSourceWithBuffer
from miles_rollout.options import FailureOptions, RolloutOptions
from miles_rollout.state import Slots

GENERATED = """
    sample.tokens, sample.response, sample.response_length = [4, 5], "3", 1
    sample.rollout_log_probs, sample.status = [-0.5], sample.Status.COMPLETED
    return sample
"""


@pytest.fixture
def worker(worker):
    """Start a worker whose hooks may take 5 seconds."""
    return lambda engine=None, **values: worker(engine, **{"hook_timeout": 5.0, **values})


@pytest.fixture
def hook(tmp_path):
    def write(body):
        file = tmp_path / "hook.py"
        file.write_text(textwrap.dedent(body))
        return f"{file}:fn"

    return write


def stats(running, name):
    return next(line for line in running.report() if line["hook"] == name and line["configured"])


def module_of(reference):
    file = reference.rpartition(":")[0]
    return next(module for module in sys.modules.values() if getattr(module, "__file__", None) == file)


CHANGES_ITS_PROMPT = f"""
seen = []
async def fn(args, sample, sampling_params):
    seen.append((len(sample.prompt), len(sample.metadata["tools"]), len(sample.label["notes"])))
    sample.prompt.append({{"role": "assistant", "content": "3"}})
    sample.metadata["tools"].append("x")
    sample.label["notes"].append("x")
{GENERATED}
"""


def test_what_a_hook_does_to_a_prompt_changes_neither_its_siblings_nor_later_epochs(worker, hook, tmp_path):
    file = tmp_path / "chat.jsonl"
    line = {"prompt": [{"role": "user", "content": "x"}], "label": {"notes": []}, "metadata": {"tools": []}}
    file.write_text(json.dumps(line))
    reference = hook(CHANGES_ITS_PROMPT)
    running = worker(
        custom_generate_function_path=reference, prompt_data=str(file), eval_prompt_data=str(file), rm_type="random",
        n_samples_per_eval_prompt=2, rollout_batch_size=1,
    )  # fmt: skip
    for rollout_id in range(2):
        running.generate(rollout_id, "1")
    running.evaluate(2, "1")
    assert module_of(reference).seen == [(1, 0, 0)] * 8


def test_groups_from_the_data_source_share_nothing_that_can_change(args_of, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "x"}], "label": [1], "metadata": {"a": [1]}}))
    args = args_of(prompt_data=str(file), custom_generate_function_path="own", n_samples_per_prompt=2)
    (one, two) = RolloutDataSourceWithBuffer(args).get_samples(1)[0]
    for mine, yours in ((one.prompt, two.prompt), (one.label, two.label), (one.metadata["a"], two.metadata["a"])):
        assert mine == yours
        assert mine is not yours


def test_a_list_among_the_sampling_parameters_belongs_to_one_call(worker, hook):
    reference = hook(
        f"""
seen = []
async def fn(args, sample, sampling_params):
    seen.append(list(sampling_params["stop"]))
    sampling_params["stop"].append("END")
{GENERATED}
"""
    )
    worker(custom_generate_function_path=reference, rollout_stop=["!"]).generate(0, "1")
    assert module_of(reference).seen == [["!"]] * 6


@pytest.mark.parametrize("color", ["def", "async def"])
def test_a_hook_that_raises_stop_iteration_is_an_error_and_no_hang(worker, hook, color):
    running = worker(custom_rm_path=hook(f"{color} fn(args, sample):\n    return next(iter([]))\n"), rm_type=None)
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        running.generate(0, "1")
    assert isinstance(caught.value.__cause__, StopIteration)
    assert stats(running, "reward")["timeouts"] == 0


@pytest.mark.parametrize(("group", "field"), [(FailureOptions, "hook_timeout"), (RolloutOptions, "generate_timeout")])
def test_an_infinite_deadline_is_refused(group, field):
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({field: float("inf")}, group)


@pytest.mark.parametrize("text", ["100%", "250%", "16,100%"])
def test_an_error_budget_that_can_never_be_spent_is_refused(text):
    with pytest.raises(ConfigError, match=r"--hook-error-budget .* 100%"):
        ErrorBudget(text)
    ErrorBudget("99.9%")


NEVER_RUNS = {
    "wrapped generator": "def fn(args, data):\n    return (data.clear() for _ in data)\n",
    "coroutine of a coroutine": (
        "async def inner(data):\n    data.clear()\nasync def fn(args, data):\n    return inner(data)\n"
    ),
}


@pytest.mark.parametrize("kind", NEVER_RUNS)
def test_a_hook_whose_body_never_ran_is_an_error_that_names_it(worker, hook, kind):
    running = worker(rollout_sample_filter_path=hook(NEVER_RUNS[kind]))
    with pytest.raises(HookResultError, match=r"sample_filter hook .* returned an? \w*(generator|coroutine)"):
        running.generate(0, "1")
    assert stats(running, "sample_filter")["errors"] == 1


HALF_DONE = {
    "reward": ("custom_rm_path", "sample", "[sample]", "1.0"),
    "group_reward": ("custom_rm_path", "samples", "samples", "[1.0] * len(samples)"),
    "dynamic_filter": ("dynamic_sampling_filter_path", "samples", "samples", "True"),
}


@pytest.mark.parametrize("name", HALF_DONE)
def test_a_call_is_repeated_on_the_samples_as_the_failed_call_got_them(worker, fake_engine, engine_reply, hook, name):
    flag, argument, samples, good = HALF_DONE[name]
    reference = hook(
        f"""
        seen = []
        async def fn(args, {argument}):
            for sample in {samples}:
                seen.append((len(sample.tokens), dict(sample.metadata), getattr(sample, "note", None)))
                sample.metadata["judged"] = sample.note = True
                sample.tokens.pop()
                sample.response_length -= 1
                sample.rollout_log_probs.pop()
                sample.loss_mask = sample.loss_mask and sample.loss_mask[:-1]
            if len(seen) < 6 and sample.group_index == 0: raise OSError("judge answered 503")
            return {good}
        """
    )
    engine = fake_engine(lambda payload: (200, engine_reply([5, 6, 7, 8], "3456")))
    options = {"hook_retries": 4, "n_samples_per_prompt": 2, "rollout_batch_size": 1, "group_rm": name[0] == "g"}
    batch = worker(engine, rm_type="f1" if name[0] == "d" else None, **{flag: reference}, **options).generate(0, "1")
    assert len(set(map(str, module_of(reference).seen))) == 1
    assert batch["batch"]["response_lengths"] == [3, 3]


def test_where_a_sample_cannot_be_copied_the_group_starts_over_instead_of_a_repetition(worker, hook, tmp_path):
    generate = tmp_path / "generate.py"
    generate.write_text(
        "import threading\nasync def fn(args, sample, sampling_params):\n"
        f"    sample.metadata['lock'] = threading.Lock()\n{GENERATED}"
    )
    body = (
        "calls = []\ndef fn(args, sample):\n    calls.append(1)\n    if len(calls) == 1: raise OSError\n    return 1.0"
    )
    running = worker(
        custom_generate_function_path=f"{generate}:fn", custom_rm_path=hook(body), rm_type=None, rollout_batch_size=1,
        n_samples_per_prompt=1,
    )  # fmt: skip
    running.generate(0, "1")
    assert stats(running, "reward")["retries"] == 0
    assert stats(running, "generate")["calls"] == 2


def test_what_a_generate_hook_writes_to_the_args_of_its_input_stays_its_own(worker, hook):
    reference = hook(
        """
        from miles_rollout.generate.single_turn import generate
        async def fn(input):
            input.args.rollout_batch_size = input.args.mine = 77
            assert input.state.args.rollout_batch_size == 2
            return await generate(input)
        """
    )
    running = worker(custom_generate_function_path=reference)
    assert [len(running.generate(i, "1")["batch"]["tokens"]) for i in range(2)] == [6, 6]
    assert stats(running, "generate")["args_written"] == ["mine", "rollout_batch_size"]


def test_what_a_data_source_writes_to_args_is_reported_and_what_the_run_writes_is_not(worker, hook, tmp_path):
    reference = hook(
        """
        from miles_rollout.data_source import RolloutDataSourceWithBuffer
        class fn(RolloutDataSourceWithBuffer):
            def __init__(self, args):
                super().__init__(args)
                args.mine = 1
        """
    )
    running = worker(data_source_path=reference)
    running.save(0, str(tmp_path))
    running.load(0, str(tmp_path))
    assert (tmp_path / "data_source.json").is_file()
    assert stats(running, "data_source")["args_written"] == ["mine"]


def test_the_sample_that_stops_the_run_is_saved_however_many_were_saved_before(worker, hook, tmp_path):
    body = "def fn(args, sample):\n    raise ValueError('always')\n"
    options = {"hook_error_budget": "16", "hook_retries": 0, "n_samples_per_prompt": 1}
    running = worker(custom_rm_path=hook(body), rm_type=None, **options)
    with pytest.raises(ValueError, match="always") as caught:
        running.generate(0, "1")
    saved = list((tmp_path / "run" / "failed").iterdir())
    assert len(saved) == 17
    assert any(str(file) in "\n".join(caught.value.__notes__) for file in saved)


POISON = """
import asyncio
calls, arrived, all_there = [], [], asyncio.Event()
async def fn(args, sample):
    arrived.append(sample.index)
    if len(arrived) == {first}: all_there.set()
    await all_there.wait()
    if sample.group_index == 0:
        calls.append(1)
        raise ValueError("poison")
    if len(arrived) > {first} or {first} == 1: await asyncio.sleep(0.05)
    return 1.0
"""


@pytest.mark.parametrize("first", [1, 4], ids=["fails early", "fails when the rollout is full"])
def test_a_group_that_always_fails_is_dropped_under_over_sampling_too(worker, hook, first):
    reference = hook(POISON.format(first=first))
    options = {"over_sampling_batch_size": 4, "n_samples_per_prompt": 1, "hook_retries": 0, "hook_error_budget": "1"}
    running = worker(custom_rm_path=reference, rm_type=None, **options)
    for rollout_id in range(4):
        running.generate(rollout_id, "1")
    assert stats(running, "reward")["drops"] == {"hook_error:reward": 1}
    # A call whose failure came when the rollout was over was not its second chance.
    assert len(module_of(reference).calls) <= 3


def test_a_group_that_went_back_keeps_the_mark_of_its_failure_and_is_started_once_for_the_budget(worker):
    running = worker(over_sampling_batch_size=4)
    loop = running._rollout.target
    budget = loop._state.guard.budget
    for rollout_id in range(4):
        running.generate(rollout_id, "1")
    assert budget.started == running._data_source._next_group
    (group,) = running._data_source.get_samples(1)

    async def put_back_and_start():
        loop._start_over = [group]
        await loop._put_back({})
        loop._start_over = []
        turns = {}
        loop._start(1, turns)
        await loop._state.guard.cancel(list(turns))
        return list(turns.values())

    # Taken out by hand, so that it is the next to come.
    running._data_source._buffer.clear()
    (turn,) = running._wait(put_back_and_start())
    assert turn.again
    assert turn.group[0].index == group[0].index


def test_a_timeout_counts_as_an_error_once(worker, hook):
    body = """
        import asyncio
        calls = []
        async def fn(args, sample):
            calls.append(1)
            if len(calls) == 1: await asyncio.sleep(60)
            if len(calls) == 2:
                try: await asyncio.sleep(60)
                except asyncio.CancelledError: raise ValueError("while it was cancelled") from None
            return 1.0
    """
    running = worker(custom_rm_path=hook(body), rm_type=None, hook_timeout=0.4, n_samples_per_prompt=1)
    running.generate(0, "1")
    assert (stats(running, "reward")["timeouts"], stats(running, "reward")["errors"]) == (2, 2)


def test_a_group_that_starts_over_in_its_filter_is_shown_once_to_the_hook_that_sees_all(worker, hook):
    reference = hook(
        """
        calls, seen = [], []
        def fn(args, samples):
            calls.append(1)
            if len(calls) == 1: raise ValueError("once")
            return samples[0].group_index != 1
        def everything(args, groups, data_source):
            seen.extend(sorted(group[0].group_index for group in groups))
        """
    )
    everything = reference.replace(":fn", ":everything")
    options = {"dynamic_sampling_filter_path": reference, "rollout_all_samples_process_path": everything}
    worker(hook_retries=0, **options).generate(0, "1")
    assert module_of(reference).seen == [0, 1, 2]


def test_a_generate_hook_may_take_the_slot_that_its_call_already_has(worker, hook):
    reference = hook(
        """
        import asyncio
        from miles_rollout.generate.single_turn import generate
        async def fn(input):
            async with input.state.generate_fn_semaphore:
                async def inner():
                    async with input.state.generate_fn_semaphore:
                        return await generate(input)
                return await asyncio.create_task(inner())
        """
    )
    running = worker(custom_generate_function_path=reference, sglang_server_concurrency=1, hook_timeout=2.0)
    assert [len(running.generate(i, "1")["batch"]["tokens"]) for i in range(2)] == [6, 6]
    assert stats(running, "generate")["timeouts"] == 0


def test_slots_bound_the_calls_of_different_tasks_and_are_all_given_back():
    async def main():
        slots, now, most = Slots(2), 0, 0

        async def call():
            nonlocal now, most
            async with slots, slots:
                now += 1
                most = max(most, now)
                await asyncio.sleep(0)
                now -= 1

        await asyncio.gather(*(call() for _ in range(9)))
        for _ in range(2):
            await asyncio.wait_for(asyncio.create_task(slots.acquire()), 1)
        return most, slots.locked()

    assert asyncio.run(main()) == (2, True)


@pytest.mark.parametrize("field", ["metadata", "train_metadata"])
def test_text_in_the_place_of_metadata_is_refused_with_hook_sample_and_field(worker, hook, field):
    body = f"async def fn(args, sample):\n    sample.{field} = 'text'\n    return 1.0\n"
    with pytest.raises(HookResultError, match=rf"reward hook .*sample \d with 'text' as {field}"):
        worker(custom_rm_path=hook(body), rm_type=None).generate(0, "1")


def test_drop_reasons_of_free_text_are_counted_as_other_once_there_are_many(worker, hook):
    body = """
        from miles_api.rollout_types import DynamicFilterOutput
        calls = []
        def fn(args, samples):
            calls.append(1)
            return DynamicFilterOutput(keep=len(calls) > 100, reason=f"std {len(calls)}")
    """
    running = worker(dynamic_sampling_filter_path=hook(body), n_samples_per_prompt=1)
    metrics = running.generate(0, "1")["metrics"]
    drops = stats(running, "dynamic_filter")["drops"]
    assert len(drops) == 65
    assert sum(drops.values()) == 100
    assert drops["other"] == 36 == metrics["rollout/dropped/other"]
