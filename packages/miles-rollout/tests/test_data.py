import json

import pytest

from miles_api.errors import ConfigError, DataError
from miles_rollout.data_source import RolloutDataSourceWithBuffer
from miles_rollout.jsonl import read_prompts
from miles_rollout.options import DataOptions

LABELLED = DataOptions(label_key="label")


def write(tmp_path, *lines):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"promt": "x", "label": "y"}', "no key 'prompt' (--input-key); did you mean 'promt'?"),
        ('{"prompt": "x"}', "no key 'label' (--label-key)"),
        ('{"prompt": 5, "label": "y"}', "neither a string nor a list of chat messages"),
        ('{"prompt": "x", "label": "y", "metadata": 3}', "'metadata' is not an object"),
        ('{"prompt": [{"role": "user", "content": "x"}], "label": "y"}', "--apply-chat-template"),
    ],
)
def test_a_malformed_line_is_named_with_file_line_and_reason(tmp_path, line, reason):
    file = write(tmp_path, '{"prompt": "x", "label": "y"}', "", line)
    with pytest.raises(DataError) as error:
        read_prompts(file, LABELLED)
    assert f"{file}, line 3: " in str(error.value)
    assert reason in str(error.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    file = write(tmp_path, "{}")
    with pytest.raises(DataError, match=r"did you mean 'data\.jsonl'"):
        read_prompts(file.replace("data.", "dta."), LABELLED)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(write(tmp_path, ""), LABELLED)


def test_labels_and_metadata_of_any_json_kind_are_kept(tmp_path):
    row = {"prompt": "x", "label": {"answers": [1, "a"]}, "metadata": {"rm_type": "f1"}}
    (prompt,) = read_prompts(write(tmp_path, json.dumps(row)), LABELLED)
    assert (prompt.label, prompt.metadata) == (row["label"], row["metadata"])


def test_groups_number_their_samples_through_the_whole_run(args_of):
    source = RolloutDataSourceWithBuffer(args_of())
    groups = source.get_samples(2) + source.get_samples(1)
    assert [[s.index for s in group] for group in groups] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [{s.group_index for s in group} for group in groups] == [{0}, {1}, {2}]
    assert len({s.prompt for s in groups[0]}) == 1


def test_every_epoch_hands_out_every_prompt_once_in_an_order_of_its_own(args_of):
    source = RolloutDataSourceWithBuffer(args_of(rollout_shuffle=True))
    epochs = [[group[0].label for group in source.get_samples(5)] for _ in range(4)]
    assert all(sorted(epoch) == ["0", "1", "2", "3", "4"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_same_seed_gives_the_same_order(args_of):
    def order(seed):
        source = RolloutDataSourceWithBuffer(args_of(rollout_shuffle=True, rollout_seed=seed))
        return [g[0].label for g in source.get_samples(10)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_groups_that_came_back_are_handed_out_first(args_of):
    source = RolloutDataSourceWithBuffer(args_of())
    _, second = source.get_samples(2)
    source.add_samples([second])
    assert source.get_buffer_length() == 1
    again = source.get_samples(2)
    assert again[0] is second
    assert again[1][0].group_index == 2


def test_saved_state_continues_exactly_with_the_buffer(args_of, tmp_path):
    args = args_of(rollout_shuffle=True, save=str(tmp_path), load=str(tmp_path))
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(4)
    groups[1][0].note = "kept"
    source.add_samples([groups[1]])
    source.save(3)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(3)
    ours, theirs = source.get_samples(6), resumed.get_samples(6)
    assert ours == theirs
    assert theirs[0][0].note == "kept"


def test_state_of_another_prompt_file_is_refused(args_of, tmp_path):
    args = args_of(save=str(tmp_path), load=str(tmp_path))
    RolloutDataSourceWithBuffer(args).save(0)
    other = args_of(load=str(tmp_path), prompt_data=write(tmp_path, '{"prompt": "x", "label": "y"}'))
    with pytest.raises(DataError, match="was written for 5 prompts"):
        RolloutDataSourceWithBuffer(other).load(0)
    with pytest.raises(DataError, match=r"holds no data_source\.json"):
        RolloutDataSourceWithBuffer(args_of(load=str(tmp_path / "nowhere"))).load(0)


def test_prompts_that_are_too_long_are_left_out_and_all_of_them_is_an_error(args_of, capsys, tmp_path):
    rows = [json.dumps({"prompt": "a" * n, "label": "x"}) for n in (3, 9)]
    file = write(tmp_path, *rows)
    source = RolloutDataSourceWithBuffer(args_of(prompt_data=file, rollout_max_prompt_len=5))
    assert {g[0].prompt for g in source.get_samples(3)} == {"aaa"}
    assert "1 of 2 prompts exceed" in capsys.readouterr().out
    with pytest.raises(DataError, match="all 2 prompts exceed --rollout-max-prompt-len 2"):
        RolloutDataSourceWithBuffer(args_of(prompt_data=file, rollout_max_prompt_len=2))


def test_chat_prompts_are_as_long_as_the_chat_template_makes_them(args_of, tmp_path):
    chats = [[{"role": "user", "content": "a" * n}] for n in (3, 9)]
    file = write(tmp_path, *[json.dumps({"prompt": chat, "label": "x"}) for chat in chats])
    options = {"prompt_data": file, "rollout_max_prompt_len": 5, "custom_generate_function_path": "mine.py:chat"}
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}{{ '>' }}"}
    source = RolloutDataSourceWithBuffer(args_of(**options, apply_chat_template_kwargs=template))
    assert [group[0].prompt for group in source.get_samples(2)] == [chats[0]] * 2
    with pytest.raises(DataError, match=r"--rollout-max-prompt-len: .*no chat template"):
        RolloutDataSourceWithBuffer(args_of(**options))


def test_a_source_without_a_file_is_a_clear_error(args_of):
    with pytest.raises(ConfigError, match="--prompt-data is not set"):
        RolloutDataSourceWithBuffer(args_of(prompt_data=None))
