import json
import math
import random
import subprocess
import sys
from pathlib import Path

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api.errors import DataError, MilesError
from miles_rollout.rewards import grade
from miles_rollout.rewards.ifbench import quick_ifbench
from miles_rollout.rewards.ifbench_checkers import ifbench_check, ifbench_score

PAIRS = [json.loads(line) for line in Path(__file__).with_name("ifbench_pairs.jsonl").read_text().splitlines()]


def asked(*instructions, **metadata):
    """Return the metadata of a prompt: instructions are names, or a name and its arguments."""
    pairs = [(item, {}) if isinstance(item, str) else item for item in instructions]
    return {"instruction_id_list": [name for name, _ in pairs], "kwargs": [given for _, given in pairs], **metadata}


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """The least that NLTK takes for its tokenizer and stop words, in place of what the machine has."""
    punkt, stopwords = tmp_path / "tokenizers/punkt_tab/english", tmp_path / "corpora/stopwords"
    punkt.mkdir(parents=True)
    stopwords.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).write_text("")
    (stopwords / "english").write_text("the\na\nis\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{pair['name']}-{pair['reference']:.0f}" for pair in PAIRS])
def test_verdicts_are_those_of_the_benchmarks_own_evaluation(pair):
    """The answers are ours; the verdicts those of Google's IFEval and of Allen AI's IFBench."""
    assert ifbench_score(pair["response"], None, asked((pair["name"], pair["kwargs"]))) == pair["reference"]


def test_every_instruction_of_a_prompt_must_be_followed():
    both = asked("punctuation:no_comma", ("keywords:existence", {"keywords": ["tide"]}))
    assert grade("ifbench", "The tide turns.", None, both) == 1.0
    assert grade("ifbench", "The tide, it turns.", None, both) == 0.0
    assert grade("ifbench", "The moon turns.", None, both) == 0.0


def test_arguments_that_are_null_are_left_out_as_in_the_published_files():
    metadata = asked(("length_constraints:number_words", {"num_words": 3, "relation": "at least", "keyword": None}))
    assert ifbench_score("one two three", None, metadata) == 1.0
    assert ifbench_score("one two", None, metadata) == 0.0
    assert ifbench_score("one", None, {"instruction_id_list": ["punctuation:no_comma"]}) == 1.0


@pytest.mark.parametrize("response", ["", "  \n", "<think>a long story</think>", "<think>so</think> \n"])
def test_an_empty_answer_follows_nothing(response):
    metadata = asked("punctuation:no_comma")
    assert grade("ifbench", response, None, metadata) == ifbench_score(response, None, metadata) == 0.0


def test_reasoning_before_the_answer_is_not_held_to_the_instructions():
    assert grade("ifbench", "<think>first, second</think>Only this.", None, asked("punctuation:no_comma")) == 1.0


@pytest.mark.parametrize(
    ("instruction", "right", "wrong"),
    [
        (
            ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}),
            "#a #b",
            "#a b",
        ),
        (("repeat:repeat_span", {"prompt_to_repeat": "a b c d e", "n_start": 0, "n_end": 2}), "a b", "b c"),
    ],
)
def test_arguments_that_the_checker_would_replace_by_chance_are_kept(instruction, right, wrong):
    metadata, before = asked(instruction), random.getstate()
    assert [ifbench_score(right, None, metadata) for _ in range(5)] == [1.0] * 5
    assert [ifbench_score(wrong, None, metadata) for _ in range(5)] == [0.0] * 5
    assert random.getstate() == before


def test_the_language_of_a_short_answer_is_the_same_every_time():
    metadata = asked(("language:response_language", {"language": "en"}))
    assert len({ifbench_score("van mal the", None, metadata) for _ in range(30)}) == 1


def test_an_answer_that_a_checker_trips_over_does_not_follow_it():
    assert ifbench_score('"', None, asked("format:quote_unquote")) == 0.0
    assert ifbench_score("[" * 5000, None, asked("detectable_format:json_format")) == 0.0


def test_sentences_and_stop_words_are_counted_with_data_that_is_on_the_machine(nltk_data):
    sentences = asked(("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}))
    assert ifbench_score("One sentence.", None, sentences) == 1.0
    assert ifbench_score("One. Two. Three.", None, sentences) == 0.0
    words = asked(("ratio:stop_words", {"percentage": 50}))
    assert ifbench_score("the sea is deep", None, words) == 1.0
    assert ifbench_score("the sea is a", None, words) == 0.0


def test_data_of_nltk_that_is_not_on_the_machine_is_named_and_not_downloaded(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a download was tried"))
    for call in (
        lambda: ifbench_score("Run.", None, asked("words:start_verb")),
        lambda: ifbench_check(None, asked("words:start_verb")),
    ):
        with pytest.raises(
            DataError, match=r"needs NLTK's (punkt_tab|averaged_perceptron_tagger_eng), .*nltk\.downloader"
        ):
            call()


def test_loading_the_checkers_downloads_nothing():
    program = """
import nltk, sys
nltk.data.path, nltk.download = [], lambda *_, **__: sys.exit("a download was tried")
import miles_rollout.rewards.ifbench_checkers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, "instruction_id_list is None"),
        ({"instruction_id_list": []}, r"instruction_id_list is \[\]"),
        ({"instruction_id_list": "punctuation:no_comma"}, "instruction_id_list is 'punc"),
        (
            asked("punctuation:no_commas"),
            "'punctuation:no_commas', which no checker knows; did you mean 'punctuation:no_comma'",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "0 kwargs for 1 instructions"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": "none"}, "kwargs is 'none'"),
        (asked(("punctuation:no_comma", {"n": 1})), "'punctuation:no_comma' hold n: expected none"),
        (asked(("length_constraints:number_words", {"num_words": 3})), "lack relation"),
        (asked(("length_constraints:number_words", {"num_words": None, "relation": "at least"})), "lack num_words"),
        (asked(("length_constraints:number_words", {"num_words": 3, "relation": "over"})), "relation"),
        (asked(("count:numbers", {"N": "x"})), "count:numbers"),
    ],
)
def test_instructions_that_cannot_be_checked_are_errors_that_name_what_is_wrong(metadata, told):
    with pytest.raises(DataError, match=told):
        ifbench_check(None, metadata)
    with pytest.raises(MilesError, match=told):
        grade("ifbench", "An answer.", None, metadata)


NAMES = sorted({pair["name"] for pair in PAIRS})
VALUES = st.none() | st.integers(-3, 5) | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2)
FIELDS = ["num_words", "relation", "keywords", "letter", "N", "small_n", "n_start", "percentage", "num_bullets", "sep"]
INSTRUCTIONS = st.tuples(
    st.sampled_from(NAMES) | st.text(max_size=5), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)
)


@settings(deadline=None)
@given(st.text(), st.lists(INSTRUCTIONS, min_size=1, max_size=2))
def test_any_answer_and_any_arguments_give_a_score_or_an_error_that_names_a_field(response, instructions):
    try:
        score = ifbench_score(response, None, asked(*instructions))
    except MilesError as error:
        assert "kwargs" in str(error) or "instruction_id_list" in str(error)  # noqa: PT017
    else:
        assert math.isfinite(score)


@settings(deadline=None)
@given(st.sampled_from(PAIRS), st.text() | st.text(alphabet=" \n.*-\"'#,;[]<>!?", min_size=1))
def test_any_answer_is_scored_where_the_arguments_are_right(pair, response):
    assert ifbench_score(response, None, asked((pair["name"], pair["kwargs"]))) in (0.0, 1.0)


@settings(deadline=None)
@given(st.text(), st.dictionaries(st.sampled_from(["instruction_id_list", "kwargs"]), VALUES | st.lists(VALUES)))
def test_metadata_of_any_form_is_taken_or_refused_before_the_pool_is_asked(response, metadata):
    try:
        assert quick_ifbench(response, None, metadata) in (0.0, None)
    except DataError as error:
        assert "kwargs" in str(error) or "instruction_id_list" in str(error)  # noqa: PT017
