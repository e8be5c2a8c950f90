import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api.errors import ConfigError, DataError
from miles_rollout.check import check
from miles_rollout.rewards import dispatch, grade
from miles_rollout.rewards.math import quick_math
from miles_rollout.rewards.math_text import check_answers, hendrycks, latex_as_text, prm
from miles_rollout.rewards.pool import GraderError, close_pools

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_pairs.jsonl").read_text().splitlines()]
"""Answers and labels with the verdicts of the graders that others use: see docs/rewards.md."""


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    close_pools()


def verdicts(kind, response):
    return [grade(kind, response.format(pair["answer"]), pair["label"]) == 1.0 for pair in PAIRS]


def agreement(found, reference, keep=lambda pair: True):
    """Return the share of pairs on which we agree with a reference, and those on which we do not."""
    kept = [(pair, right) for pair, right in zip(PAIRS, found, strict=True) if keep(pair)]
    assert len(kept) > 300
    differ = [(pair["answer"], pair["label"]) for pair, right in kept if right != pair[reference]]
    return 1 - len(differ) / len(kept), differ


def test_math_agrees_with_math_verify_and_with_prm800k():
    found = verdicts("math", "So $x>0$, and the answer is \\boxed{{{}}}.")
    for reference in ("math_verify", "prm800k"):
        share, differ = agreement(found, reference)
        assert share >= 0.97, differ
    share, differ = agreement(found, "prm800k", lambda pair: pair["math_verify"] == pair["prm800k"])
    assert share == 1.0, differ


def test_deepscaler_agrees_with_its_original():
    share, differ = agreement(verdicts("deepscaler", "hm\n</think>\nSo $$\\boxed{{{}}}$$"), "deepscaler")
    assert share >= 0.97, differ


def test_dapo_agrees_with_its_original_on_every_label_that_is_no_fraction_decimal_or_percentage():
    found = verdicts("dapo", "Thus x = 7.\nAnswer: ${}$")
    share, differ = agreement(found, "dapo", lambda pair: not re.search(r"[/.%]|frac", pair["label"]))
    assert share >= 0.97, differ


@pytest.mark.parametrize("kind", ["math", "deepscaler"])
def test_most_ordinary_answers_need_no_process(kind):
    quick = dispatch._function(dispatch.KINDS[kind].quick)
    decided = [quick(f"</think>\\boxed{{{pair['answer']}}}", pair["label"], {}) is not None for pair in PAIRS]
    assert sum(decided) / len(decided) > 0.6


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("\\frac{47}{5}", "9\\frac{2}{5}"),
        ("(x+1)(x-1)", "x^2-1"),
        ("\\frac{2}{4}", "\\frac12"),
        ("0.333333", "\\frac13"),
        ("x=5", "5"),
        ("3, 1", "1, 3"),
        ("\\text{(C)}", "C"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}"),
        ("(-\\infty, 2]", "x \\le 2"),
        ("50\\%", 0.5),
        ("\\text{Monday}", "monday"),
        ("12\\text{ cm}", 12),
        ("\\frac{\\sqrt{3}}{3}", ["\\frac{1}{\\sqrt3}", "7"]),
        ("7", "the answer is \\boxed{7}"),
    ],
)
def test_math_knows_equal_values(answer, label):
    assert grade("math", f"thus \\boxed{{{answer}}}", label) == 1.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("92/5", "9\\frac25"),
        ("2^{n+1}", "2^n+1"),
        ("[1,2]", "(1,2)"),
        ("-7", "7"),
        ("", "7"),
        ("7", None),
        ("7", {"a": 7}),
    ],
)
def test_math_tells_different_values_apart(answer, label):
    assert grade("math", f"thus \\boxed{{{answer}}}", label) == 0.0


def test_math_looks_for_an_answer_where_no_box_is():
    assert grade("math", "We try 5. The final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5") == 1.0
    assert grade("math", "We get 1/2, so the answer is 3", "0.5") == 0.0


def test_deepscaler_wants_the_thinking_ended_and_a_box_after_it():
    assert grade("deepscaler", "<think>\\boxed{5}</think> so \\boxed{7}", 7) == 1.0
    assert grade("deepscaler", "<think>\\boxed{7}</think> so 7", 7) == 0.0
    assert grade("deepscaler", "\\boxed{7}", 7) == 0.0
    assert grade("deepscaler", "###Response \\boxed{7}", 7) == 1.0


def test_deepscaler_wants_fractions_as_the_label_has_them_and_values_otherwise():
    assert grade("deepscaler", "</think>\\boxed{2/4}", "1/2") == 0.0
    assert grade("deepscaler", "</think>\\boxed{x^2+2x+1}", "(x+1)^2") == 1.0


def test_dapo_scores_one_or_minus_one_by_the_last_answer_near_the_end():
    assert grade("dapo", "Answer: 4\nAnswer: $3$", 3) == 1.0
    assert grade("dapo", "Answer: 3" + "." * 300, 3) == -1.0
    assert grade("dapo", "\\boxed{3}", 3) == -1.0
    assert [grade("dapo", f"Answer: {a}", b) for a, b in (("1/2", "\\frac12"), ("A", "A"), ("[0,1)", "[0, 1)"))] == [
        1.0
    ] * 3
    assert grade("dapo", "Answer: 3.0", 3) == -1.0


def test_a_boxed_kind_grades_the_box_as_that_kind_reads_answers():
    assert grade("boxed_dapo", "so \\boxed{3}", 3) == 1.0
    assert grade("boxed_dapo", "Answer: 3", 3) == -1.0
    assert grade("boxed_deepscaler", "so \\boxed{3}", 3) == 1.0
    assert grade("boxed_math", "so \\boxed{x^2+7}", 7) == 0.0


def test_normal_forms_are_those_of_their_graders():
    assert hendrycks("x = \\dfrac12 \\text{ cm}") == "\\frac{1}{2}"
    assert hendrycks(".5") == "\\frac{1}{2}"
    assert prm("\\$1,234.00") == "1234"
    assert prm("7 \\frac{3}{4} \\text{ miles}") == "7+3/4"
    assert latex_as_text("\\frac{x+1}{\\sqrt2}") == "(x+1)/sqrt(2)"


# Towers and factorials that no machine can compute are the pool's business: its tests hang on purpose.
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip
_ODD = st.text(st.characters(codec=None) | st.sampled_from("\\{}$%/.,0123456789-+=^_ \n"))


def score_unless_late(kind, response, label):
    try:
        return grade(kind, response, label)
    except GraderError as error:
        return "late" if "within --rm-timeout" in str(error) else repr(error)


@pytest.mark.parametrize("kind", ["math", "deepscaler", "dapo", "boxed_math", "boxed_dapo", "random"])
@settings(max_examples=60, deadline=None)
@given(response=_ODD, label=_JSON)
def test_any_response_and_any_label_get_a_score(kind, response, label):
    for text in (response, f"</think>Answer: \\boxed{{{response}}}"):
        assert score_unless_late(kind, text, label) in (-1.0, 0.0, 1.0, "late")


@pytest.mark.parametrize(
    "answer",
    [
        "\\boxed{" * 500, "{" * 10_000, "\\boxed{" + "(" * 5000 + ")" * 5000 + "}", "\\boxed{1e30000000}",
        "\\boxed{" + "9" * 50_000 + "}", "\\boxed{\\frac{1}{0}}", "\\boxed{0^{-1}}", "\\boxed{nan}", "\\boxed{²}",
        "\\boxed{\\infty-\\infty}", "\\boxed{1_000}", "\ud800\\boxed{\ud800}", "\\boxed{a=b=c=d}", "\\boxed{\\\\\\\\}",
        "$$$$", "\x00" * 100, "x" * 300_000, bytes(range(256)).decode("latin1") * 20,
        "\\boxed{" + "\\frac{1}{" * 100 + "2" + "}" * 100 + "}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("label", ["3", "\\frac12", "(1,2)"])
def test_an_odd_answer_is_wrong_and_no_error(answer, label):
    for kind in ("math", "deepscaler", "dapo"):
        assert grade(kind, f"</think>Answer: {answer}", label) in (0.0, -1.0)


@pytest.mark.parametrize(
    "vast",
    [
        "9^{9^9}", "{9}^{{9}^{9}}", "9^9^9^9", "2^(3^(99))", "10^{10000000}", "2**9**9**9", "1+7^{-9^{99}}",
        "999999999!", "9!!!",
    ],
)  # fmt: skip
def test_a_tower_that_no_machine_computes_answers_its_own_text_and_nothing_else(vast):
    assert quick_math(f"\\boxed{{{vast}}}", vast, {}) == 1.0
    assert quick_math(f"\\boxed{{{vast}}}", ["7", "\\pi"], {}) == 0.0
    assert quick_math("\\boxed{x+1}", vast, {}) == 0.0
    assert grade("math", "so it is \\boxed{1+x}", [vast, "x+1"]) == 1.0


@pytest.mark.parametrize("vast", ["9**9**9", "9^9^9", "999999999!", "9!!!", "9**99999999"])
def test_deepscaler_leaves_towers_unasked_too(vast):
    assert grade("deepscaler", f"</think>\\boxed{{x+{vast}}}", "x+1") == 0.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [("2^{3^2}", "512"), ("7^{7^2}", "7^{49}"), ("10^{20}-1", "99999999999999999999"), ("5!", "120")],
)
def test_powers_that_can_be_computed_are(answer, label):
    assert grade("math", f"\\boxed{{{answer}}}", label) == 1.0


@pytest.mark.parametrize("kind", ["math", "deepscaler", "dapo", "f1", "gpqa", "random", "boxed_math"])
@pytest.mark.parametrize("response", [None, b"\xff\x00", "\ud800"])
def test_a_response_that_is_no_text_is_wrong_and_no_error(kind, response):
    assert grade(kind, response, ["A", "ten"][kind == "f1"]) in ((0.0, 1.0) if kind == "random" else (0.0, -1.0))


@pytest.mark.parametrize(
    "code", ["__import__('os').getpid()", "().__class__", "x.real", "print(1)", "exec(1)", "(lambda:1)()"]
)
def test_an_answer_is_never_run_as_code(code):
    pytest.importorskip("sympy")
    from miles_rollout.rewards.deepscaler_sympy import _equal

    assert not _equal(code, "1")


@pytest.mark.parametrize("kind", ["math", "deepscaler", "dapo"])
@pytest.mark.parametrize("label", [None, "", [], {"answer": 3}])
def test_a_label_that_accepts_nothing_is_told_before_the_run(configure, tmp_path, kind, label):
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"prompt": "1+1?", "label": label}) + "\n")
    (problem,) = [text for text in check(configure(rm_type=kind, prompt_data=str(file))) if "label" in text]
    assert "is no answer" in problem
    with pytest.raises(DataError):
        check_answers(label, {})


def test_a_library_that_is_not_installed_is_told_before_the_run(configure, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    problems = list(check(configure(rm_type="boxed_math")))
    assert any("boxed_math needs math_verify" in p and "pip install 'miles-rollout[rewards]'" in p for p in problems)
    with pytest.raises(ConfigError, match="needs sympy"):
        dispatch.check_rm_type("deepscaler")


def test_what_text_and_numbers_decide_needs_no_library():
    assert quick_math("\\boxed{42}", "42", {}) == 1.0
    assert quick_math("\\boxed{41}", "42", {}) == 0.0
    assert quick_math("\\boxed{\\sqrt{8}}", "2\\sqrt2", {}) is None
