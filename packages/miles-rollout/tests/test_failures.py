import asyncio
import subprocess
import sys
import textwrap

import pytest

from miles_api.errors import ConfigError, DataError, HookError, HookResultError, MilesError, ServiceError
from miles_api.loading.hookset import HookSet
from miles_api.record import read_dump
from miles_api.sample import Sample
from miles_rollout.budget import ErrorBudget
from miles_rollout.failures import Guard
from miles_rollout.pristine import copy_sample

# What each hook is given and what a good answer looks like, by name.
FLAGS = {
    "generate": "custom_generate_function_path",
    "reward": "custom_rm_path",
    "group_reward": "custom_rm_path",
    "dynamic_filter": "dynamic_sampling_filter_path",
}
HEADS = {
    "generate": "fn(args, sample, sampling_params)",
    "reward": "fn(args, sample)",
    "group_reward": "fn(args, samples)",
    "dynamic_filter": "fn(args, samples)",
}
GOOD = {
    "generate": "done(sample)",
    "reward": "1.0",
    "group_reward": "[1.0] * len(samples)",
    "dynamic_filter": "True",
}
PREAMBLE = """
import asyncio, threading, time
from miles_api.sample import Sample
calls = []
def done(sample):
    sample.tokens, sample.response, sample.response_length = [4, 5], "3", 1
    sample.rollout_log_probs, sample.status = [-0.5], Sample.Status.COMPLETED
    return sample
def subject(first):
    return first[0] if isinstance(first, list) else first
"""


@pytest.fixture
def worker(worker):
    """Start a worker whose hooks may take 5 seconds."""
    return lambda engine=None, **values: worker(engine, **{"hook_timeout": 5.0, **values})


@pytest.fixture
def hostile(worker, tmp_path):
    """Start a worker whose hook of this name has this body; `GOOD` in it stands for a right answer."""

    def start(name, body, *, sync=False, **values):
        head = ("def " if sync else "async def ") + HEADS[name]
        first = "sample" if name in ("generate", "reward") else "samples"
        body = textwrap.dedent(body).replace("GOOD", GOOD[name]).replace("SUBJECT", f"subject({first})")
        file = tmp_path / f"{name}.py"
        file.write_text(f"{PREAMBLE}\n{head}:\n{textwrap.indent(body, '    ')}\n")
        values |= {FLAGS[name]: f"{file}:fn"} | ({"group_rm": True} if name == "group_reward" else {})
        # One reward at a time.
        values.setdefault("rm_type", None if name in ("reward", "group_reward") else "f1")
        return worker(**values)

    return start


def stats(running, name):
    return next(line for line in running.report() if line["hook"] == name and line["configured"])


def module_of(file):
    return next(module for module in sys.modules.values() if getattr(module, "__file__", None) == str(file))


every_hook = pytest.mark.parametrize("name", list(FLAGS))
either_color = pytest.mark.parametrize("sync", [False, True], ids=["async", "def"])


@every_hook
@either_color
def test_a_hook_that_always_raises_stops_the_run_with_its_own_exception_and_saves_the_sample(
    hostile, name, sync, tmp_path
):
    running = hostile(name, "calls.append(1)\nraise KeyError('no such label')", sync=sync)
    with pytest.raises(KeyError, match="no such label") as caught:
        running.generate(0, "1")
    notes = "\n".join(caught.value.__notes__)
    assert f"{name} hook {tmp_path / name}.py:fn" in notes
    (saved,) = (tmp_path / "run" / "failed").iterdir()
    assert saved.name.startswith(f"{name}-")
    assert str(saved) in notes
    (record,) = read_dump(saved)
    assert all(isinstance(sample, Sample) and sample.prompt.startswith("say") for sample in record.groups[0].samples)
    found = stats(running, name)
    assert 4 <= found["errors"] <= found["calls"]
    assert found["drops"] == {f"hook_error:{name}": 1}


@every_hook
def test_a_hook_that_raises_now_and_then_is_repeated_and_the_rollout_is_whole(hostile, name):
    running = hostile(name, "calls.append(1)\nif len(calls) % 3 == 1: raise OSError('flaky')\nreturn GOOD")
    result = running.generate(0, "1")
    assert len(result["batch"]["tokens"]) == 6
    assert stats(running, name)["retries"] == result["metrics"][f"hooks/{name}/retries"] >= 1
    assert result["metrics"][f"hooks/{name}/errors"] >= 1


@every_hook
def test_a_group_that_a_hook_fails_on_for_good_starts_over_and_is_then_dropped_and_counted(hostile, name):
    body = "if SUBJECT.group_index == 1:\n    calls.append(1)\n    raise ValueError('bad group')\nreturn GOOD"
    running = hostile(name, body, hook_retries=0, hook_error_budget="3")
    result = running.generate(0, "1")
    assert set(result["batch"]["group_indices"]) == {0, 2}
    assert result["metrics"][f"rollout/dropped/hook_error:{name}"] == 1.0
    assert stats(running, name)["drops"] == {f"hook_error:{name}": 1}
    assert stats(running, name)["errors"] >= 2


@every_hook
def test_a_group_starts_over_from_what_the_data_source_handed_out(hostile, name, tmp_path):
    body = """
        calls.append(SUBJECT.prompt)
        SUBJECT.metadata["seen"] = SUBJECT.metadata.get("seen", 0) + 1
        SUBJECT.prompt += "!"
        if len(calls) == 1: raise ValueError("once")
        return GOOD
    """
    running = hostile(name, body, hook_retries=0, rollout_batch_size=1, n_samples_per_prompt=1)
    running.generate(0, "1")
    assert module_of(tmp_path / f"{name}.py").calls == ["say 0>", "say 0>"]


def test_a_generation_is_repeated_on_a_sample_that_no_attempt_has_touched(hostile, tmp_path):
    body = """
        calls.append((sample.prompt, dict(sample.metadata), list(sample.tokens)))
        sample.prompt, sample.metadata["seen"], sample.tokens = "!", 1, [7]
        if len(calls) < 6: raise ValueError("not yet")
        return GOOD
    """
    running = hostile("generate", body, hook_retries=2, rollout_batch_size=1, n_samples_per_prompt=1)
    running.generate(0, "1")
    assert module_of(tmp_path / "generate.py").calls == [("say 0>", {}, [])] * 6


@every_hook
@pytest.mark.parametrize("kind", ["async", "def", "swallows its cancellation"])
def test_a_hook_that_hangs_is_given_up_and_named(hostile, name, kind):
    bodies = {
        "async": "await asyncio.sleep(3600)",
        "def": "time.sleep(6)",
        "swallows its cancellation": (
            "while True:\n    try: await asyncio.sleep(3600)\n    except asyncio.CancelledError: pass"
        ),
    }
    running = hostile(name, bodies[kind], sync=kind == "def", hook_timeout=0.2, hook_retries=0)
    with pytest.raises(HookError, match="ran past --hook-timeout") as caught:
        running.generate(0, "1")
    assert f"{name} hook" in str(caught.value)
    assert stats(running, name)["timeouts"] >= 1


def test_a_hung_thread_does_not_take_the_others_along(hostile):
    body = "if sample.index == 0 and not calls:\n    calls.append(1)\n    time.sleep(3)\nreturn GOOD"
    running = hostile("reward", body, sync=True, hook_timeout=0.3)
    result = running.generate(0, "1")
    assert len(result["batch"]["tokens"]) == 6
    assert result["metrics"]["hooks/reward/timeouts"] == 1.0
    assert result["metrics"]["hooks/hung_threads"] == 1.0
    # The thread still has the sample: the group started over instead.
    assert stats(running, "reward")["retries"] == 0


def test_the_run_stops_when_half_of_the_threads_hang(hostile):
    body = "if sample.index < 4:\n    time.sleep(6)\nreturn GOOD"
    running = hostile("reward", body, sync=True, hook_timeout=0.3, hook_error_budget="100", n_samples_per_prompt=6)
    with pytest.raises(HookError, match=r"[4-8] of the 8 threads .* hang .* reward hook"):
        running.generate(0, "1")


def test_waiting_for_a_thread_does_not_count_against_the_deadline(configure, tmp_path):
    file = tmp_path / "slow.py"
    file.write_text("import time\ndef fn(args, sample):\n    time.sleep(0.2)\n    return 1.0\n")
    args = configure(custom_rm_path=f"{file}:fn", rm_type=None, hook_timeout=0.6).args
    hook = HookSet(args, ["reward"]).need("reward")

    async def all_at_once():
        guard = Guard(args)
        return await asyncio.gather(*(guard.once(hook, args, Sample()) for _ in range(40)))

    assert asyncio.run(all_at_once()) == [1.0] * 40
    assert hook.stats.timeouts == 0


@every_hook
@pytest.mark.parametrize("value", ["[]", "'good'", "None"])
def test_a_hook_that_returns_garbage_is_named(hostile, name, value):
    running = hostile(name, f"return {value}", hook_retries=0)
    with pytest.raises(HookResultError, match=f"{name} hook"):
        running.generate(0, "1")
    assert stats(running, name)["errors"] >= 2


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "{'a': 1.0}", "{'b': 1.0}", "{'a': 'x'}"])
def test_a_reward_that_does_not_score_names_hook_and_sample(hostile, value):
    key = "b" if "'a': 1" in value else "a" if value.startswith("{'a'") else None
    running = hostile("reward", f"return {value}", reward_key=key)
    with pytest.raises(HookResultError, match=r"reward hook .*sample \d"):
        running.generate(0, "1")


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("generate", "SUBJECT.tokens = 'abc'"),
        ("generate", "SUBJECT.loss_mask = [1] * 99"),
        ("generate", "SUBJECT.response = b'bytes'"),
        ("generate", "SUBJECT.status = 'half way'"),
        ("reward", "SUBJECT.tokens = [object()]"),
        ("reward", "SUBJECT.rollout_log_probs = [0.5] * 99"),
        ("group_reward", "SUBJECT.response_length = 99"),
        ("group_reward", "SUBJECT.weight_versions = None"),
        ("dynamic_filter", "SUBJECT.metadata = None"),
        ("dynamic_filter", "SUBJECT.rollout_log_probs = SUBJECT.rollout_log_probs[:-1]"),
    ],
)
def test_odd_values_written_to_a_sample_are_refused_with_hook_sample_and_field(hostile, name, mutation):
    body = f"answer = GOOD\n{mutation}\nreturn answer"
    running = hostile(name, body, hook_retries=0)
    field = mutation.split(".", 1)[1].split(" ")[0]
    with pytest.raises(HookResultError, match=rf"{name} hook .*sample \d") as caught:
        running.generate(0, "1")
    assert field in str(caught.value)


@pytest.mark.parametrize("name", ["group_reward", "dynamic_filter"])
@pytest.mark.parametrize("mutation", ["samples.clear()", "samples.append(samples[0])", "samples[:] = [None]"])
def test_what_a_hook_does_to_the_list_of_a_group_does_not_change_the_group(hostile, name, mutation):
    answer = "[1.0, 2.0, 3.0]" if name == "group_reward" else "True"
    batch = hostile(name, f"{mutation}\nreturn {answer}").generate(0, "1")["batch"]
    assert batch["group_indices"] == [0, 0, 0, 1, 1, 1]


@every_hook
@either_color
def test_a_hook_that_asks_the_process_to_exit_stops_the_run_with_a_clear_error(hostile, name, sync):
    running = hostile(name, "raise SystemExit(3)", sync=sync)
    with pytest.raises(HookError, match=rf"{name} hook .* raised SystemExit\(3\): a hook may not end the process"):
        running.generate(0, "1")


@every_hook
def test_a_hook_that_raises_cancelled_error_by_itself_has_failed(hostile, name):
    running = hostile(name, "raise asyncio.CancelledError", hook_retries=0)
    with pytest.raises(HookResultError, match="raised CancelledError, though nobody had cancelled it"):
        running.generate(0, "1")


@every_hook
def test_a_def_hook_may_hand_back_a_coroutine(hostile, name):
    body = f"async def later():\n    return {GOOD[name]}\nreturn later()"
    assert len(hostile(name, body, sync=True).generate(0, "1")["batch"]["tokens"]) == 6


@every_hook
def test_a_hook_may_allocate_a_lot_and_let_it_go(hostile, name):
    running = hostile(name, "waste = bytearray(50_000_000)\nreturn GOOD", sync=True)
    assert len(running.generate(0, "1")["batch"]["tokens"]) == 6


@every_hook
def test_what_a_hook_writes_to_args_stays_its_own(hostile, name):
    running = hostile(name, "args.rollout_batch_size = 77\nargs.hook_timeout = 'x'\nreturn GOOD")
    assert [len(running.generate(i, "1")["batch"]["tokens"]) for i in range(2)] == [6, 6]
    assert stats(running, name)["args_written"] == ["hook_timeout", "rollout_batch_size"]


def test_a_hook_that_blocks_the_event_loop_is_named_once_and_counted(hostile, capsys):
    running = hostile("reward", "if sample.index in (0, 6):\n    time.sleep(1.4)\nreturn GOOD")
    metrics = [running.generate(i, "1")["metrics"] for i in range(2)]
    out = capsys.readouterr().out
    assert out.count("blocks the event loop") == 1
    assert "reward hook" in out
    assert "reward.py:" in out
    assert [each["hooks/reward/blocked"] for each in metrics] == [1.0, 1.0]


def test_a_loop_that_stays_blocked_ends_the_process_and_names_the_hook(tmp_path):
    hook = tmp_path / "stuck.py"
    hook.write_text("import time\nasync def fn(args, sample):\n    time.sleep(60)\n")
    script = f"""
        import asyncio
        from miles_api import spec, hooks
        from miles_api.loading import bind
        from miles_rollout.watchdog import Watchdog
        hook = bind.resolve(spec.REGISTRY["reward"], "{hook}:fn")
        async def main():
            dog = Watchdog(0.3)
            dog.add([hook])
            with dog.watching():
                await hook.acall(None, None, None)
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "has blocked the event loop" in done.stderr
    assert "stuck.py" in done.stderr


def test_leftovers_that_swallow_their_cancellation_do_not_hold_up_the_rollout(hostile):
    body = """
        if sample.group_index > 1:
            while True:
                try: await asyncio.sleep(3600)
                except asyncio.CancelledError: pass
        return GOOD
    """
    running = hostile("generate", body, over_sampling_batch_size=4, hook_timeout=0.5)
    assert len(running.generate(0, "1")["batch"]["tokens"]) == 6
    found = stats(running, "generate")
    assert (found["errors"], found["timeouts"]) == (0, 0)


def test_what_the_default_generation_meets_at_the_engine_is_not_the_hooks_fault(worker, fake_engine):
    engine = fake_engine(lambda payload: (500, {"error": "broken weights"}))
    with pytest.raises(ServiceError, match=r"answered 500"):
        worker(engine, hook_error_budget="100").generate(0, "1")
    assert len(engine.requests) <= 6


def test_an_engine_that_refuses_a_generate_hook_spends_its_retries(worker, fake_engine, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("async def fn(input):\n    return await input.state.post('/generate', {})\n")
    engine = fake_engine(lambda payload: (400, {"error": "bad payload"}))
    with pytest.raises(ServiceError, match=r"(?s)answered 400.*generate hook .* failed on sample"):
        worker(engine, custom_generate_function_path=f"{file}:fn").generate(0, "1")
    assert len(engine.requests) > 6


def test_eval_samples_that_a_hook_fails_on_are_counted_and_left_out_of_the_mean(hostile, prompt_file):
    body = "if sample.label in '01': raise ValueError('no score')\nreturn 1.0"
    running = hostile("reward", body, eval_prompt_data=prompt_file, hook_retries=0)
    metrics = running.evaluate(0, "1")["metrics"]
    assert metrics["eval/prompts/hook_errors"] == 2.0
    assert metrics["eval/prompts/reward"] == 1.0


def test_an_evaluation_of_which_nothing_is_left_stops_the_run(hostile, prompt_file):
    running = hostile("reward", "raise ValueError('no score')", eval_prompt_data=prompt_file, hook_retries=0)
    with pytest.raises(ValueError, match="no score") as caught:
        running.evaluate(0, "1")
    assert "all 5 evaluations failed" in "\n".join(caught.value.__notes__)


@pytest.mark.parametrize("reference", ["GOODFILE:scored", "GOODFILE:missing", "GOODFILE:wrong"])
def test_a_sample_may_name_its_own_hooks_and_a_bad_one_fails_that_sample(worker, tmp_path, reference):
    file = tmp_path / "own.py"
    file.write_text(
        "from miles_api.sample import Sample\n"
        "def scored(args, sample):\n    return 5.0\n"
        "def wrong(a, b, c):\n    return 5.0\n"
        "class Source:\n"
        "    def __init__(self, args): self.next = 0\n"
        "    def get_samples(self, n):\n"
        "        self.next += n\n"
        "        return [[Sample(index=g * 3 + i, group_index=g, rollout_id=g * 3 + i, prompt='say', label='3',\n"
        f"                 custom_rm_path={reference.replace('GOODFILE', str(file))!r} if g == 0 else None)\n"
        "                 for i in range(3)] for g in range(self.next - n, self.next)]\n"
        "    def add_samples(self, samples): ...\n"
        "    def save(self, rollout_id): ...\n"
        "    def load(self, rollout_id=None): ...\n"
    )
    running = worker(data_source_path=f"{file}:Source", hook_error_budget="1")
    result = running.generate(0, "1")
    if reference.endswith("scored"):
        assert result["batch"]["raw_reward"] == [5.0, 5.0, 5.0, 1.0, 1.0, 1.0]
        (own,) = [line for line in running.report() if line["hook"] == "reward" and line["configured"]]
        assert own["calls"] == 3
    else:
        assert set(result["batch"]["group_indices"]) == {1, 2}
        assert result["metrics"]["rollout/dropped/hook_error:reward"] == 1.0


def test_a_sample_may_name_its_own_generation(worker, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        f"{PREAMBLE}\n"
        "async def own(args, sample, sampling_params):\n    sample.weight_versions = ['1']\n    return done(sample)\n"
        "def begin(args, rollout_id, buffer, n):\n"
        "    group = buffer.pop()\n"
        "    for sample in group: sample.generate_function_path = __file__ + ':own'\n"
        "    return [group]\n"
    )
    running = worker(buffer_filter_path=f"{file}:begin")
    running._data_source.add_samples(running._data_source.get_samples(1))
    batch = running.generate(0, "1")["batch"]
    assert [tokens for tokens in batch["tokens"] if tokens == [4, 5]] == [[4, 5]] * 3


@pytest.mark.parametrize(
    ("flag", "head", "body", "problem"),
    [
        ("rollout_sample_filter_path", "args, data", "raise KeyError('mine')", "mine"),
        ("rollout_sample_filter_path", "args, data", "data[0].clear()", "something else than a list of groups"),
        ("rollout_sample_filter_path", "args, data", "data.pop()", "--rollout-batch-size is 2"),
        ("rollout_sample_filter_path", "args, data", "time.sleep(6)", "ran past --hook-timeout"),
        ("rollout_all_samples_process_path", "args, all_samples, source", "raise KeyError('mine')", "mine"),
        ("rollout_all_samples_process_path", "args, all_samples, source", "time.sleep(6)", "ran past --hook-timeout"),
        ("custom_reward_post_process_path", "args, samples", "return [1.0], [1.0]", "1 raw_rewards for 6 samples"),
        ("custom_reward_post_process_path", "args, samples", "return [0.0] * 6, [float('nan')] * 6", "nan"),
        ("custom_reward_post_process_path", "args, samples", "return None", "not (raw_rewards, rewards)"),
        ("custom_reward_post_process_path", "args, samples", "time.sleep(6)", "ran past --hook-timeout"),
        ("custom_convert_samples_to_train_data_path", "args, samples", "return {}", "no column"),
        ("custom_convert_samples_to_train_data_path", "args, samples", "return []", "not a dict of columns"),
        ("custom_rollout_log_function_path", "r, args, samples, extra, seconds", "raise KeyError('mine')", "mine"),
    ],
)
def test_a_hook_that_runs_once_a_rollout_stops_the_run_and_is_named(worker, tmp_path, flag, head, body, problem):
    file = tmp_path / "once.py"
    file.write_text(f"import time\ndef fn({head}, **more):\n    {body}\n")
    with pytest.raises((KeyError, MilesError)) as caught:
        worker(**{flag: f"{file}:fn"}, hook_timeout=0.3).generate(0, "1")
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert problem in text
    assert f"hook {file}:fn" in text


def test_rewards_of_numpy_kind_are_taken_as_numbers(worker, tmp_path):
    pytest.importorskip("numpy")
    file = tmp_path / "arrays.py"
    file.write_text(
        "import numpy as np\n"
        "def post(args, samples):\n    return np.ones(len(samples)), np.zeros(len(samples), dtype=np.float32)\n"
        "def score(args, samples):\n    return np.arange(len(samples), dtype=np.float32)\n"
        "class Verdict:\n    keep, reason = np.bool_(True), None\n"
        "def keep(args, samples, **kwargs):\n    return Verdict\n"
    )
    batch = worker(
        custom_reward_post_process_path=f"{file}:post", custom_rm_path=f"{file}:score", group_rm=True, rm_type=None,
        dynamic_sampling_filter_path=f"{file}:keep",
    ).generate(0, "1")["batch"]  # fmt: skip
    assert batch["rewards"] == [0.0] * 6
    assert type(batch["raw_reward"][0]) is float


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ("[[Sample(index=0)] * 3] * (n - 1)", "1 group; 2 were asked for"),
        ("[[Sample(index=0)]] * n", "--n-samples-per-prompt is 3"),
        ("[['text'] * 3] * n", "not a list of Samples"),
        ("None", "NoneType"),
    ],
)
def test_a_data_source_that_hands_out_something_else_is_named(worker, tmp_path, groups, problem):
    file = tmp_path / "source.py"
    file.write_text(
        "from miles_api.sample import Sample\n"
        "class Source:\n"
        "    def __init__(self, args): ...\n"
        f"    def get_samples(self, n):\n        return {groups}\n"
        "    def add_samples(self, samples): ...\n"
        "    def save(self, rollout_id): ...\n"
        "    def load(self, rollout_id=None): ...\n"
    )
    with pytest.raises((HookResultError, DataError)) as caught:
        worker(data_source_path=f"{file}:Source").generate(0, "1")
    assert problem in str(caught.value) or groups == "None"


def test_a_quiet_run_reports_no_hook_metrics_and_a_configured_hook_its_calls(worker, hostile):
    assert not [name for name in worker().generate(0, "1")["metrics"] if name.startswith("hooks/")]
    running = hostile("reward", "return GOOD")
    counts = [running.generate(i, "1")["metrics"]["hooks/reward/calls"] for i in range(2)]
    assert counts == [6.0, 6.0]


def test_a_hook_that_was_due_but_not_needed_is_counted_as_skipped(hostile, worker, tmp_path):
    file = tmp_path / "both.py"
    file.write_text(
        f"{PREAMBLE}\nasync def fn(args, sample, params):\n    sample.reward = 2.0\n    return done(sample)\n"
        "def score(args, sample):\n    return 0.0\n"
        "def score_all(args, samples):\n    return [0.0] * len(samples)\n"
    )
    for rm, group, count in (("score", False, 6), ("score_all", True, 2)):
        running = worker(
            custom_generate_function_path=f"{file}:fn", custom_rm_path=f"{file}:{rm}", group_rm=group, rm_type=None
        )
        assert running.generate(0, "1")["batch"]["raw_reward"] == [2.0] * 6
        found = stats(running, "group_reward" if group else "reward")
        assert (found["calls"], found["skipped"]) == (0, count)


@pytest.mark.parametrize("text", ["", "x", "10%,16", "16,", ",10%", "-1", "1.5", "16 10%", "10%%"])
def test_a_malformed_error_budget_is_refused(text):
    with pytest.raises(ConfigError, match="--hook-error-budget"):
        ErrorBudget(text)


def test_an_error_budget_ends_at_the_smaller_of_count_and_share():
    def lasts(text, started, least=1):
        budget = ErrorBudget(text, least)
        budget.started = started
        return next(n for n in range(1000) if budget.spend())

    assert lasts("16", 10) == 16
    assert lasts("10%", 100) == 10
    assert lasts("16,10%", 50) == 5
    assert lasts("16,10%", 5000) == 16
    assert lasts("0", 5000) == 0
    assert lasts("10%", 1, least=40) == 4


def test_a_copied_sample_shares_nothing_that_can_change():
    sample = Sample(
        index=1, prompt=[{"role": "user", "content": "x"}], label={"a": [1]}, metadata={"b": {"c": [2]}}, tokens=[1, 2],
        status=Sample.Status.ABORTED,
    )  # fmt: skip
    sample.note = ["mine"]
    twin = copy_sample(sample)
    assert twin == sample
    assert twin.note == ["mine"]
    for theirs, ours in (
        (twin.prompt[0], sample.prompt[0]), (twin.label["a"], sample.label["a"]), (twin.tokens, sample.tokens),
        (twin.metadata["b"]["c"], sample.metadata["b"]["c"]), (twin.note, sample.note),
        (twin.prefix_cache_info, sample.prefix_cache_info),
    ):  # fmt: skip
        assert theirs is not ours


def test_the_buffer_filter_is_told_which_rollout_it_serves_and_has_to_take_groups_out(worker, tmp_path):
    file = tmp_path / "buffer.py"
    file.write_text(
        "seen = []\n"
        "def fn(args, rollout_id, buffer, n):\n    seen.append(rollout_id)\n    return [buffer.pop()]\n"
        "def keep(args, rollout_id, buffer, n):\n    return buffer[:1]\n"
    )
    running = worker(buffer_filter_path=f"{file}:fn")
    running._data_source.add_samples(running._data_source.get_samples(1))
    running.generate(7, "1")
    assert module_of(file).seen == [7]
    running = worker(buffer_filter_path=f"{file}:keep")
    running._data_source.add_samples(running._data_source.get_samples(1))
    with pytest.raises(HookResultError, match="left in the buffer"):
        running.generate(7, "1")
