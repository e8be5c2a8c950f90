import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api.errors import DataError, MilesError
from miles_rollout.rewards import grade
from miles_rollout.rewards.gpqa import gpqa_score

CHOICES = ["mitochondria", "the nucleus", "42 m/s", "a proton and a neutron"]
PAIRS = [json.loads(line) for line in Path(__file__).with_name("gpqa_pairs.jsonl").read_text().splitlines()]


def named(response, **metadata):
    """Return the letters among A to D, and X, that score 1 for a response; `-` for none."""
    metadata = {"choices": CHOICES, **metadata}
    return "".join(letter for letter in "ABCD" if grade("gpqa", response, letter, metadata)) or "-"


def test_verdicts_are_those_of_the_established_graders_on_ordinary_answers():
    """The pairs are ours; `reference` is the verdict of slime's grader, `simple_evals` that of OpenAI's pattern."""
    scores = [grade("gpqa", pair["response"], pair["label"], pair["metadata"]) for pair in PAIRS]
    same = [score == pair["reference"] for score, pair in zip(scores, PAIRS, strict=True)]
    assert sum(same) >= 0.97 * len(PAIRS)
    read = [(pair["simple_evals"], score) for score, pair in zip(scores, PAIRS, strict=True)]
    assert {wanted for wanted, _ in read} == {0.0, 1.0, None}
    assert all(wanted in (None, score) for wanted, score in read)


@pytest.mark.parametrize(
    "response",
    [
        "Answer: (C)", "answer: c", "The correct answer is **C**.", "**Answer:** C", "## Answer\n\n**C**", "C", "(C).",
        "C) 42 m/s", "\\boxed{C}", "$\\boxed{\\text{(C)}}$", "The correct option is\n$$\\boxed{\\mathrm{C}}$$",
        "The answer to this question must be C because A proton cannot.", "I'd go with option C", "<answer>C</answer>",
        "Option A is wrong. Option C is correct.", "Hence $C$ is the right answer", "42 m/s", "The answer is 42 m/s.",
        "The correct answer is:\n\n**(C) 42 m/s**", "the answer is I think C", "<think>Answer: A</think>Answer: C",
        "Not the nucleus, so it is C", "We get 42 m/s, so option C must hold", "The answer is not A but C",
    ],
)  # fmt: skip
def test_a_letter_or_the_text_of_a_choice_is_read_however_it_is_written(response):
    assert named(response) == "C"


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: A. Wait, that is wrong. Answer: B", "B"),
        ("\\boxed{A} ... no: \\boxed{B}", "B"),
        ("The answer is A.\n\nOn reflection, B is correct.", "B"),
        ("The answer is B and C is wrong.", "B"),
        ("The answer is B, as A and C are wrong", "B"),
        ("\\boxed{A}. Final answer: B", "B"),
    ],
)
def test_the_last_definite_statement_counts(response, letter):
    assert named(response) == letter


@pytest.mark.parametrize(
    "response", ["The answer is B or C", "Answer: B and C", "A, C", "Both A and C are correct.", "\\boxed{A, B}"]
)
def test_an_answer_that_hedges_is_right_for_no_letter(response):
    assert named(response) == "-"


def test_reasoning_is_no_answer():
    assert named("<think>The answer is C, surely.</think> I am not sure.") == "-"


@pytest.mark.parametrize("response", ["", "   ", "</think>", "A proton is charged.", "I do not know", "Answer: K"])
def test_an_answer_that_names_no_choice_is_right_for_no_letter(response):
    assert named(response) == "-"


@pytest.mark.parametrize(
    ("label", "metadata"),
    [
        ("C", {}), ("(c)", {}), ("\\boxed{C}", {}), (2, {}), (2.0, {}), ("42 m/s", {}), ("C) 42 m/s", {}),
        (None, {"correct_letter": "C"}), ("A", {"correct_letter": "c"}), (None, {"correct_answer": "42 m/s"}),
    ],
)  # fmt: skip
def test_label_and_metadata_name_the_right_choice_in_any_usual_form(label, metadata):
    assert grade("gpqa", "The answer is C", label, {"choices": CHOICES, **metadata}) == 1.0
    assert grade("gpqa", "The answer is B", label, {"choices": CHOICES, **metadata}) == 0.0


def test_letters_may_be_named_and_choices_may_be_an_object():
    assert grade("gpqa", "Answer: Q", "Q", {"choices": ["x", "y"], "valid_letters": "PQ"}) == 1.0
    assert grade("gpqa", "Answer: yes it is", "Y", {"choices": {"Y": "yes it is", "N": "no"}}) == 1.0
    assert grade("gpqa", "Answer: J", 9) == 1.0


def test_without_choices_the_text_of_the_label_is_looked_for():
    assert grade("gpqa", "It must be the Krebs cycle.", "Krebs cycle") == 1.0
    assert grade("gpqa", "It must be 0.5", "5") == 0.0


@pytest.mark.parametrize(
    ("label", "metadata", "told"),
    [
        (None, {}, "label is None"),
        ("maybe", {"choices": CHOICES}, "label is 'maybe'"),
        (4, {"choices": CHOICES}, "label is 4"),
        (True, {"choices": CHOICES}, "label is True"),
        ("A", {"correct_letter": "E", "choices": CHOICES}, "correct_letter is 'E'"),
        ("A", {"correct_letter": 2}, "correct_letter is 2"),
        ("A", {"choices": 4}, "choices is 4"),
        ("A", {"choices": ["x"] * 3, "valid_letters": ["A", "B"]}, "3 choices and letters for 2"),
        ("A", {"valid_letters": ["A", "yes"]}, "valid_letters is"),
    ],
)
def test_data_that_does_not_say_what_is_right_is_an_error_that_names_the_field(label, metadata, told):
    with pytest.raises(DataError, match=told):
        grade("gpqa", "Answer: A", label, metadata)


TEXT = st.lists(
    st.sampled_from(
        ["Answer", " is ", ":", "A", "B", "(", ")", "**", "\\boxed{", "}", " or ", "\n", "option ", "nucleus"]
    )
    | st.text(max_size=4)
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=6,
)
METADATA = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["choices", "correct_letter", "valid_letters", "answer_text"], JSON)
)


@settings(deadline=None)
@given(TEXT, JSON, METADATA)
def test_any_answer_label_and_metadata_give_a_score_or_an_error_that_names_a_field(response, label, metadata):
    try:
        score = gpqa_score(response, label, metadata)
    except MilesError as error:
        assert any(field in str(error) for field in ("label", "choices", "correct_letter", "valid_letters"))  # noqa: PT017
    else:
        assert math.isfinite(score)


@settings(deadline=None)
@given(TEXT)
def test_an_answer_is_never_right_for_two_letters(response):
    assert len(named(response)) == 1
