"""A program in a response, and the tests in a label: what scores, and what is an error instead."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest

from miles_api.errors import ConfigError, DataError
from miles_api.testing import check_hook, hook_args, make_sample
from miles_hooks_contrib.check import check
from miles_hooks_contrib.code_execution import CodeExecution
from miles_hooks_contrib.code_tests import cases_of, program_in
from miles_hooks_contrib.sandbox import session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are made of Linux namespaces")

ADD = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = {"inputs": ["1 2\n", "3 4\n", "5 5\n"], "outputs": ["3\n", "7\n", "10\n"]}
SORT = "def sort(xs):\n    print('working')\n    return tuple(sorted(xs))"


def fenced(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


def scores(*pairs, **options):
    """Score pairs of response and label at the same time; unsandboxed, for sandboxes have tests of their own."""
    args = hook_args(CodeExecution, allow_unsandboxed=True, code_processes=4096, **options)
    hook = CodeExecution(args)

    async def score():
        samples = [make_sample(response=response, label=label) for response, label in pairs]
        return await asyncio.gather(*(hook(args, sample) for sample in samples))

    return asyncio.run(score())


def test_the_program_is_the_last_block_of_python_after_thinking():
    assert program_in(fenced("x = 1")) == "x = 1\n"
    assert program_in(fenced("x = 1") + "\nBetter:\n" + fenced("x = 2")) == "x = 2\n"
    assert program_in("```text\nno\n```\n```\nx = 1\n```\n```bash\nls\n```") == "x = 1\n"
    assert program_in("<think>" + fenced("x = 1") + "</think>" + fenced("x = 2")) == "x = 2\n"
    assert program_in("print(1)") == "print(1)"
    assert program_in("```python\ncut off") is None
    assert program_in("  ") is None


@pytest.mark.timeout(10)
@pytest.mark.parametrize("repeated", ["```python\n", "```a"])
def test_a_response_that_repeats_itself_is_read_in_one_pass(repeated):
    assert program_in("```text\n" + repeated * 20_000) is None


def test_what_a_program_reports_that_no_parser_takes_fails_its_test():
    report = "import os\ndef f():\n    os.write(3, b'[' * 60_000); os._exit(0)"
    assert scores((fenced(report), {"fn_name": "f", "inputs": [[]], "outputs": [[1]]})) == [0.0]


def test_all_tests_must_pass():
    always_three = "print(3)"
    assert scores((fenced(ADD), SUMS), (fenced(always_three), SUMS), ("", SUMS)) == [1.0, 0.0, 0.0]


def test_or_the_share_that_passes_counts():
    assert scores((fenced("print(3)"), SUMS), code_score="share") == [pytest.approx(1 / 3)]


def test_functions_are_called_with_arguments_and_what_they_print_does_not_matter():
    label = {"fn_name": "sort", "inputs": [[[3, 1, 2]], [[]]], "outputs": [[1, 2, 3], []]}
    method = "class Solution:\n    def sort(self, xs):\n        return sorted(xs)"
    answers = [(fenced(code), label) for code in (SORT, method, "def sort(xs): return xs", "def other(xs): return xs")]
    assert scores(*answers) == [1.0, 1.0, 0.0, 0.0]


def test_assertions_are_run_after_the_program():
    label = ["assert sort([2, 1]) == (1, 2)", "assert sort([]) == ()"]
    assert scores((fenced(SORT), label), (fenced("def sort(xs): return (1, 2)"), label)) == [1.0, 0.0]
    setup = {"setup": "import math", "asserts": ["assert math.isclose(sort([2, 1])[0], 1)"]}
    assert scores((fenced(SORT), setup), (fenced(SORT), json.dumps(setup)), (fenced(SORT), label[0])) == [1.0] * 3


def test_a_program_that_leaves_before_its_assertions_has_not_passed_them():
    label = ["assert False"]
    ways = ("import sys; sys.exit(0)", "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)", "x = 1")
    assert scores(*((fenced(way), label) for way in ways)) == [0.0] * 4


def test_a_program_finds_no_expected_output_in_its_process():
    snoop = (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, (dict, list)) and '31337' in str(o)[:9999]]"
    )
    label = {"inputs": ["x"], "outputs": ["31337"]}
    [test] = cases_of(make_sample(label=label))
    assert "31337" not in json.dumps(test.case)
    assert scores((fenced(snoop + "\nprint(31337 if len(found) > 1 else 'nothing')"), label)) == [0.0]


def test_tests_of_live_code_bench_are_read():
    stdin = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
    calls = make_sample(
        response=fenced("def add(a, b): return a + b"),
        label=[{"input": "1\n2", "output": "3", "testtype": "functional"}],
        metadata={"func_name": "add"},
    )
    assert scores((fenced(ADD), stdin)) == [1.0]
    [test] = cases_of(calls)
    assert test.case == {"kind": "call", "name": "add", "arguments": [1, 2]}
    assert test.passed("", "3")
    assert not test.passed("", "4")


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True), ("3 \n\n", "3", True), ("1 2\n3", "1 2\n3\n", True), ("1 2 3", "1 2\n3", False),
        ("0.50", "0.5", True), ("1e3", "1000", True), ("0.3", "0.30001", False), ("yes", "YES", False),
        ("nan", "nan", True), ("", "3", False),
    ],
)  # fmt: skip
def test_output_is_compared_line_by_line_and_numbers_by_value(printed, expected, same):
    [test] = cases_of(make_sample(label={"inputs": [""], "outputs": [expected]}))
    assert test.passed(printed, "") is same


def test_a_result_that_is_no_json_has_not_passed():
    [test] = cases_of(make_sample(label={"fn_name": "f", "inputs": [[]], "outputs": [None]}))
    assert not test.passed("", "")
    assert test.passed("", "null")


@pytest.mark.parametrize(
    "label",
    [
        None, 7, "", [], {}, {"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}, {"inputs": ["1"]},
        [1, 2], {"asserts": [""]}, {"inputs": [3], "outputs": ["x"]}, [{"input": "1", "testtype": "functional"}],
    ],
)  # fmt: skip
def test_a_label_without_tests_is_an_error_and_no_score(label):
    with pytest.raises(DataError, match="holds no tests for code_execution"):
        scores((fenced(ADD), label))


def test_a_hanging_a_failing_and_a_broken_program_score_nothing():
    label = {"inputs": ["1 2"], "outputs": ["3"]}
    programs = ("while True: pass", "raise ValueError", "def (", "print('3' * 10_000_000)", ADD)
    assert scores(*((fenced(code), label) for code in programs), code_seconds=1.0) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_no_more_programs_run_at_once_than_allowed(tmp_path):
    meet = (
        f"import os, time\nos.chdir({str(tmp_path)!r})\nopen(str(os.getpid()), 'w')\n"
        "n = len(os.listdir())\ntime.sleep(0.1)\nos.remove(str(os.getpid()))\nprint(n <= 2)"
    )
    label = {"inputs": [""], "outputs": ["True"]}
    assert scores(*[(fenced(meet), label)] * 6, code_concurrency=2) == [1.0] * 6


def test_the_hook_keeps_to_its_signature_in_the_sandbox():
    try:
        session.require_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))
    samples = [make_sample(response=fenced(ADD), label=SUMS), make_sample(response="I do not know", label=SUMS)]
    check_hook("reward", CodeExecution, samples=samples)


def test_a_machine_without_namespaces_is_refused_before_anything_runs(monkeypatch):
    # Where there is no namespace to be had, a supervisor answers like this.
    refuse = "import sys, json, struct; b = json.dumps({'refused': 'unshare: no'}).encode()"
    command = [sys.executable, "-c", f"{refuse}; sys.stdout.buffer.write(struct.pack('>I', len(b)) + b)"]
    monkeypatch.setattr(session, "_COMMAND", command)
    with pytest.raises(ConfigError, match="--allow-unsandboxed"):
        CodeExecution(hook_args(CodeExecution))
    args = hook_args(CodeExecution, custom_rm_path="code_execution")
    assert "--allow-unsandboxed" in "".join(check(SimpleNamespace(args=args, sources={})))
