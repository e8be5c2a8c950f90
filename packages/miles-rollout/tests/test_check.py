import json
import subprocess
import sys
import textwrap

import pytest
from transformers import AutoTokenizer

from miles_api.errors import DataError
from miles_rollout.check import check, idle, notes
from miles_rollout.tokenizer_files import ChatTemplate, check_tokenizer


def test_a_malformed_budget_is_a_problem_that_names_the_flag(configure):
    assert any("--hook-error-budget 'lots'" in problem for problem in check(configure(hook_error_budget="lots")))
    assert not [problem for problem in check(configure()) if "budget" in problem]


def test_checks_do_not_import_transformers(configure, tmp_path):
    config = configure(apply_chat_template=False)
    values = {key: config.flat()[key] for key in ("hf_checkpoint", "prompt_data", "label_key", "rm_type")}
    script = f"""
        import sys
        from miles_api.config import RunConfig, option_groups
        from miles_rollout.check import check
        config = RunConfig({{name: kind() for name, kind in option_groups().items()}}, {{}})
        config = config.replace("test", rollout_batch_size=2, n_samples_per_prompt=2, **{values!r})
        print(list(check(config)))
        print([name for name in ("transformers", "torch") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_hooks_that_recorded_rollouts_do_not_call_are_idle(configure):
    reasons = idle(configure(load_debug_rollout_data="x.mdump", rollout_function_path="recorded"))
    assert {"generate", "reward", "dynamic_filter", "sample_filter", "data_source"} <= set(reasons)
    assert not {"reward_post_process", "convert_samples", "rollout_log"} & set(reasons)


def test_the_default_loop_by_its_name_calls_its_hooks(configure):
    assert "reward" not in idle(configure(rollout_function_path="inference"))
    assert "reward" in idle(configure(rollout_function_path="sft"))


def test_a_deterministic_run_is_refused_without_our_own_forward(configure, tmp_path):
    asked = {"deterministic": True, "engine_impl": "hf"}
    assert any("--engine-impl lean or auto, not hf" in problem for problem in check(configure(**asked)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    problems = list(check(configure(deterministic=True, hf_checkpoint=str(tmp_path))))
    assert any("--deterministic needs our own forward" in problem and "gpt2" in problem for problem in problems)
    assert not [problem for problem in check(configure(deterministic=True)) if "determin" in problem]


def test_the_plan_of_a_deterministic_run_names_hooks_that_may_not_be(configure):
    (note,) = notes(configure(deterministic=True, custom_rm_path="mine.py:score", rm_type=None))
    assert "hooks of yours do: reward" in note
    assert notes(configure(deterministic=True, custom_generate_function_path="single_turn")) == []
    assert notes(configure(custom_rm_path="mine.py:score", rm_type=None)) == []


def test_a_mask_for_tokens_of_older_weights_is_noted_where_there_can_be_none(configure, hook):
    masks = {"mask_offpolicy_in_partial_rollout": True}
    assert notes(configure(**masks, rollout_function_path=hook("def fn(*given): ..."))) == []
    for none in ({}, {"rollout_function_path": "inference"}, {"load_debug_rollout_data": "made.mdump"}):
        (note,) = notes(configure(**masks, **none))
        assert note.startswith("--mask-offpolicy-in-partial-rollout changes nothing here")
    assert notes(configure(**masks, partial_rollout=True, over_sampling_batch_size=3)) == []


def test_partial_rollouts_want_more_groups_than_are_needed_and_no_determinism(configure):
    (note,) = notes(configure(partial_rollout=True, over_sampling_batch_size=2))
    assert note.startswith("--partial-rollout changes nothing here: no more groups are started than a rollout needs")
    assert notes(configure(partial_rollout=True, over_sampling_batch_size=3)) == []
    problems = list(check(configure(partial_rollout=True, over_sampling_batch_size=3, deterministic=True)))
    assert any("--partial-rollout with --deterministic" in problem for problem in problems)


@pytest.fixture
def templated(tokenizer_dir, tmp_path):
    """A copy of the tokenizer with a chat template."""
    file = tmp_path / "templated"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    def make(template):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(file)
        return str(file)

    return make


TEMPLATE = """{% for m in messages -%}
    {%- if loop.index0 > 8 %}{% break %}{% endif -%}
    <{{ m.role }}>{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{% if tools %}{{ tools | tojson }} {{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}<assistant{{ ' thinks' if thinking else '' }}>{% endif %}"""


def test_a_chat_template_is_rendered_as_transformers_renders_it(templated):
    folder = templated(TEMPLATE)
    messages = [{"role": "user", "content": " tell me <b>5 & é</b> "}, {"role": "assistant", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    real = AutoTokenizer.from_pretrained(folder)
    ours = check_tokenizer(folder)
    for given in ({}, {"tools": tools}, {"thinking": True}, {"add_generation_prompt": True, "tools": tools}):
        assert ours.apply_chat_template(messages, tokenize=False, **given) == real.apply_chat_template(
            messages, tokenize=False, **given
        )


def test_a_template_that_refuses_names_file_and_line_in_the_check(templated, configure):
    folder = templated("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}")
    problems = list(check(configure(hf_checkpoint=folder, apply_chat_template=True)))
    assert any("line 1: --apply-chat-template: system first" in problem for problem in problems)


def test_a_tokenizer_without_template_or_with_broken_files_is_a_problem(tokenizer_dir, configure, tmp_path):
    problems = list(check(configure(apply_chat_template=True)))
    assert any("has no chat template" in problem for problem in problems)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(DataError, match="the tokenizer does not load"):
        check_tokenizer(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tokenizer"):
        check_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="is not a JSON object"):
        ChatTemplate(str(tmp_path))
