import json

import pytest

from miles_rollout.check import check


@pytest.fixture
def problems(configure, tmp_path):
    """Check a run over the given prompts and return what is said of the prompt file."""

    def found(*lines, **options):
        file = tmp_path / "scored.jsonl"
        file.write_text("".join(json.dumps({"prompt": "1>", "label": None, **line}) + "\n" for line in lines))
        return [text for text in check(configure(prompt_data=str(file), **options)) if "scored.jsonl" in text]

    return found


GOOD = {"label": "B", "metadata": {"choices": ["x", "y"], "instruction_id_list": ["punctuation:no_comma"]}}
BAD = {"label": "C", "metadata": {"choices": ["x", "y"], "instruction_id_list": ["punctuation:no_coma"]}}


@pytest.mark.parametrize(("rm_type", "told"), [("gpqa", "label is 'C'"), ("ifbench", "'punctuation:no_coma'")])
def test_a_prompt_that_no_answer_could_score_on_is_told_before_the_run_once(problems, rm_type, told):
    assert problems(GOOD, rm_type=rm_type) == []
    (text,) = problems(GOOD, BAD, BAD, rm_type=rm_type)
    assert "prompt 2: " in text
    assert told in text
    assert "(2 prompts in all)" in text


def test_a_prompt_is_checked_for_the_kind_that_its_metadata_names(problems):
    own = {**BAD, "metadata": {**BAD["metadata"], "rm_type": "gpqa"}}
    assert problems(BAD, rm_type="f1") == []
    (text,) = problems(BAD, own, rm_type="f1")
    assert "prompt 2: label is 'C'" in text


def test_a_question_without_a_label_is_told_since_f1_would_reward_silence(problems):
    assert problems({"label": []}, {"label": "x"}, {"label": {"text": []}}, rm_type="f1") == []
    (text,) = problems({"label": None}, rm_type="f1")
    assert "prompt 1: label is None" in text
    assert "--label-key" in text
    (text,) = problems({"label": {"solution": "x"}}, rm_type="f1")
    assert "label is {'solution': 'x'}" in text


def test_weighted_kinds_are_checked_each(problems):
    gpqa, ifbench = sorted(problems(GOOD, BAD, rm_type=None, rm_weights={"gpqa": 1.0, "ifbench": 0.5}))
    assert "label is 'C'" in gpqa
    assert "no_coma" in ifbench


def test_a_reward_of_the_users_own_is_not_held_to_the_forms_of_the_built_in_ones(problems, tmp_path):
    (tmp_path / "own.py").write_text("def reward(args, sample):\n    return 1.0\n")
    assert problems(BAD, rm_type=None, custom_rm_path=f"{tmp_path}/own.py:reward") == []


def test_no_more_than_five_different_problems_are_told(problems):
    lines = [{"label": f"text {i}", "metadata": {"choices": ["x"]}} for i in range(9)]
    found = problems(*lines, rm_type="gpqa")
    assert len(found) == 6
    assert "and 4 other problems" in found[-1]
