import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from miles_api import Sample
from miles_api.errors import DataError
from miles_rollout import running
from miles_rollout.rewards import dispatch, pool
from miles_rollout.rewards.pool import GraderError, GraderPool

SLOW = "slow_grader:score"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Let grading processes find the grader of these tests."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    yield
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def one():
    """A pool of one process with a short deadline."""
    made = GraderPool(1, 1.0)
    yield made
    made.close()


def graded(on, response, label=None, **metadata):
    return on.submit(SLOW, response, label, metadata).result(timeout=120)


@pytest.mark.parametrize("answer", ["hang in python", "hang in one operation"])
def test_a_grader_that_hangs_is_killed_and_replaced_and_counted(one, answer):
    one.counts.clear()
    with pytest.raises(GraderError, match=r"no verdict within --rm-timeout 1 s"):
        graded(one, answer, 9)
    assert graded(one, "four") == 4.0
    assert one.counts == {"timeouts": 1}


@pytest.mark.parametrize(("answer", "said"), [("die", "exit code 3"), ("want memory", "out of memory")])
def test_a_grader_that_dies_is_replaced_and_counted(one, answer, said):
    one.counts.clear()
    with pytest.raises(GraderError, match=said):
        graded(one, answer)
    assert graded(one, "four") == 4.0
    assert one.counts == {"deaths": 1}


def test_a_grader_that_raises_is_no_verdict_either_and_its_process_stays(one):
    with pytest.raises(GraderError, match="KeyError: 'no such thing'"):
        graded(one, "raise")
    assert graded(one, "print") == 5.0


def test_data_that_no_answer_can_be_graded_by_is_named_as_that_and_not_as_a_grader_that_fails(one):
    one.take_counts()
    with pytest.raises(DataError, match=r"^the label says too little$"):
        graded(one, "say that the data is wrong")
    assert one.take_counts() == {}


def test_any_text_and_any_label_reach_the_grader(one):
    assert graded(one, "\ud800\x00\n", {"a": {1}}) == 3.0
    assert graded(one, "x" * 3_000_000) == 3_000_000


def test_a_grading_process_imports_what_its_grader_needs_and_no_more(one):
    assert graded(one, "modules") == 0.0


def test_many_threads_share_a_pool_and_each_gets_its_own_verdict():
    shared, wrong = GraderPool(2, 30.0), []

    def ask(length):
        wrong.extend(n for n in range(20) if graded(shared, "x" * (length + n)) != length + n)

    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    shared.close()


def test_a_closed_pool_ends_what_runs_and_takes_nothing_more(tmp_path):
    closing, file = GraderPool(1, 60.0), tmp_path / "pid"
    running = closing.submit(SLOW, "pid", None, {"file": str(file)})
    waiting = closing.submit(SLOW, "four", None, {})
    until(lambda: file.exists() and file.read_text())
    closing.close()
    for future in (running, waiting):
        with pytest.raises(GraderError, match="closed"):
            future.result(timeout=30)
    until(lambda: not lives(int(file.read_text())))
    with pytest.raises(GraderError, match="closed"):
        closing.submit(SLOW, "four", None, {})


@pytest.mark.parametrize(("busy", "timeout"), [("sleeping", 600.0), ("in one operation", 2.0)])
def test_graders_die_with_a_parent_that_is_killed_at_the_latest_soon_after_the_deadline(tmp_path, busy, timeout):
    file = tmp_path / "pid"
    script = f"""
        from miles_rollout.rewards.pool import GraderPool
        GraderPool(1, {timeout}).submit({SLOW!r}, "pid", {busy!r}, {{"file": {str(file)!r}}}).result()
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    until(lambda: file.exists() and file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not lives(int(file.read_text())))


def test_a_forked_process_has_graders_of_its_own():
    """As where a data set is scored with `map(num_proc=2)` and the parent has graded before."""
    script = """
        import multiprocessing
        from miles_rollout.rewards import grade
        def right(n):
            return grade("math", f"\\\\boxed{{x^2+{n}}}", f"{n}+x^2")
        assert right(1) == 1.0
        with multiprocessing.get_context("fork").Pool(2) as workers:
            assert workers.map_async(right, [2, 3]).get(60) == [1.0, 1.0]
        assert right(4) == 1.0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


def lives(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        # A zombie is dead, though nobody has looked at it yet.
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def hanging(monkeypatch, args_of):
    """A kind whose answers may hang, with the arguments of a run that uses it."""
    monkeypatch.setitem(dispatch.KINDS, "slow", dispatch.Kind(SLOW, in_pool=True, lowest=-1.0))
    dispatch._found.cache_clear()
    yield lambda **options: args_of(rm_type="slow", rm_workers=1, rm_timeout=1.0, **options)
    pool.close_pools()
    dispatch._found.cache_clear()


def test_an_answer_without_a_verdict_is_an_error_of_the_reward_or_scores_lowest_and_is_counted(hanging):
    late = Sample(response="hang in python")
    pool.take_counts()
    with pytest.raises(GraderError, match="--rm-on-timeout zero"):
        asyncio.run(dispatch.reward(hanging(), late))
    assert asyncio.run(dispatch.reward(hanging(rm_on_timeout="zero"), late)) == -1.0
    assert asyncio.run(dispatch.reward(hanging(), Sample(response="four"))) == 4.0
    assert pool.take_counts() == {"timeouts": 2}
    assert pool.take_counts() == {}


def test_a_grader_that_raises_is_never_a_score_whatever_becomes_of_late_answers(hanging):
    pool.take_counts()
    with pytest.raises(GraderError, match="KeyError"):
        asyncio.run(dispatch.reward(hanging(rm_on_timeout="zero"), Sample(response="raise")))
    assert pool.take_counts() == {"errors": 1}


def test_a_grader_that_cannot_be_started_is_never_a_score(hanging, monkeypatch, tmp_path):
    (tmp_path / "broken_grader.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(dispatch.KINDS, "slow", dispatch.Kind("broken_grader:score", in_pool=True))
    with pytest.raises(GraderError, match=r"did not start .*exit code 4"):
        asyncio.run(dispatch.reward(hanging(rm_on_timeout="zero"), Sample(response="four")))


def test_a_grader_is_sent_the_metadata_that_it_reads_and_no_more(hanging, monkeypatch):
    sample = Sample(response="metadata", metadata={"wanted": 1, "trace": "x" * 100_000, ("odd",): {1}})
    monkeypatch.setitem(dispatch.KINDS, "slow", dispatch.Kind(SLOW, in_pool=True, reads=("wanted", "absent")))
    assert asyncio.run(dispatch.reward(hanging(), sample)) == 1.0
    del sample.metadata["odd",]
    monkeypatch.setitem(dispatch.KINDS, "slow", dispatch.Kind(SLOW, in_pool=True))
    dispatch._found.cache_clear()
    assert asyncio.run(dispatch.reward(hanging(), sample)) == 2.0


@pytest.fixture
def rollout(worker, fake_engine, monkeypatch, tmp_path):
    """Generate one rollout of a group of one, whose grader hangs in its first calls; return it, and how many engine
    requests it took."""
    monkeypatch.setitem(dispatch.KINDS, "slow", dispatch.Kind("slow_grader:hangs_at_first", in_pool=True))
    monkeypatch.setattr(running, "_latest", {})
    dispatch._found.cache_clear()
    monkeypatch.setenv("SLOW_GRADER_CALLS", str(tmp_path / "calls"))

    def run(hangs, **options):
        # Processes that run know the number of before.
        pool.close_pools()
        monkeypatch.setenv("SLOW_GRADER_HANGS", str(hangs))
        sizes = {"rollout_batch_size": 1, "n_samples_per_prompt": 1, "hook_retries": 1, "hook_error_budget": "1"}
        engine = fake_engine()
        started = worker(engine, rm_type="slow", rm_workers=1, rm_timeout=0.5, **sizes, **options)
        return started.generate(0, "1"), len(engine.requests)

    yield run
    dispatch._found.cache_clear()


def test_an_answer_whose_grader_hung_is_graded_again(rollout):
    result, requests = rollout(1)
    assert result["batch"]["raw_reward"] == [1.0]
    assert requests == 1
    assert (result["metrics"]["rollout/rm_timeouts"], result["metrics"]["hooks/reward/retries"]) == (1.0, 1.0)


def test_a_group_whose_grader_hangs_on_is_generated_anew_and_none_is_lost(rollout):
    result, requests = rollout(2)
    assert result["batch"]["raw_reward"] == [1.0]
    assert (requests, result["metrics"]["rollout/rm_timeouts"]) == (2, 2.0)
    assert "rollout/dropped/hook_error:reward" not in result["metrics"]


def test_a_group_whose_grader_never_answers_is_dropped_and_the_run_stops_past_the_budget(rollout):
    result, requests = rollout(4)
    assert (requests, result["metrics"]["rollout/dropped/hook_error:reward"]) == (3, 1.0)
    assert result["batch"]["group_indices"] == [1]
    with pytest.raises(GraderError, match=r"no verdict within --rm-timeout 0.5 s(?s:.*)more than --hook-error-budget"):
        rollout(99)


def test_late_answers_that_score_lowest_lose_no_group(rollout):
    result, requests = rollout(99, rm_on_timeout="zero")
    assert (result["batch"]["raw_reward"], requests) == ([0.0], 1)
    assert result["metrics"]["rollout/rm_timeouts"] == 1.0
