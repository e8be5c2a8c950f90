import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.data.metrics.squad_metrics import compute_f1

from miles_rollout.rewards import grade

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "answer", "value", "x"]), inner)
    ),
    max_leaves=6,
)
WORDS = st.lists(
    st.sampled_from(["the", "An", "a", "cat's", "Łódź", "3.5", "co-op", "Ünder", "“cat”", "…", "THE cat", ""])
)


@settings(deadline=None)
@given(WORDS.map(" ".join), WORDS.map(" ".join) | st.text())
def test_f1_is_the_one_of_the_official_squad_script(response, answer):
    assert grade("f1", response, answer) == pytest.approx(compute_f1(answer, response))


@pytest.mark.parametrize(
    ("label", "best"),
    [
        (["14 December 1972", "December 1972"], 1.0),
        ({"text": ["December 1972", "1972"], "answer_start": [3, 12]}, 1.0),
        ([{"text": "December 1972", "answer_start": 3}], 1.0),
        ({"answer": ["in December of 1972"]}, 2 / 3),
        ({"value": "1972", "aliases": ["Dec. 1972", "December, 1972"]}, 1.0),
        (1972, 2 / 3),
    ],
)
def test_the_best_of_the_accepted_answers_counts_in_every_published_form(label, best):
    assert grade("f1", "the December 1972", label) == pytest.approx(best)


@pytest.mark.parametrize("label", [None, [], "", ["", "the"], {"text": [], "answer_start": []}])
def test_only_an_empty_response_answers_a_question_without_an_answer(label):
    assert grade("f1", " The. ", label) == 1.0
    assert grade("f1", "Paris", label) == 0.0


def test_an_answer_of_articles_alone_does_not_make_an_empty_response_right():
    assert grade("f1", "", ["the", "The Who"]) == 0.0


@settings(deadline=None)
@given(st.text(), JSON)
def test_any_label_scores_between_0_and_1(response, label):
    assert 0.0 <= grade("f1", response, label) <= 1.0
