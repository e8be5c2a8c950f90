import importlib
import pickle
import subprocess
import sys
import textwrap

import pytest

import miles_api
from miles_api import Args, DynamicFilterOutput, RolloutFnTrainOutput, Sample
from miles_api.compat import translate
from miles_api.compat.finder import install
from miles_api.compat.table import FLAG_VALUES, ROOTS
from miles_api.errors import HookLoadError, HookSignatureError
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import bind
from miles_api.loading.load import import_reference


def bound(name, target):
    return bind(REGISTRY[name], "mine", target)


def load(reference):
    return import_reference(reference, short_names="miles.hooks.reward", flag="--custom-rm-path")


def python(body, path):
    """Run `body` in a fresh interpreter with `path` importable; return what it prints."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{textwrap.dedent(body)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_older_packages_can_be_imported_once_a_hook_is_loaded_and_not_before(tmp_path):
    (tmp_path / "hook.py").write_text("from slime.utils.types import Sample\ndef fn(args, sample): return Sample\n")
    printed = python(
        f"""
        import importlib.util
        from miles_api import Sample
        from miles_api.loading.load import import_reference
        print(importlib.util.find_spec("slime"), importlib.util.find_spec("miles"))
        fn = import_reference({str(tmp_path / "hook.py:fn")!r}, short_names="miles.hooks.reward", flag="--x")
        from miles.utils.types import Sample as other
        print(fn(None, None) is Sample is other)
        """,
        tmp_path,
    )
    assert printed == ["None", "None", "True"]


def test_a_package_that_is_really_installed_wins(tmp_path):
    (tmp_path / "slime" / "utils").mkdir(parents=True)
    (tmp_path / "slime" / "__init__.py").touch()
    (tmp_path / "slime" / "utils" / "__init__.py").touch()
    (tmp_path / "slime" / "utils" / "types.py").write_text("Sample = 'the real one'\ndef score(args, sample): ...\n")
    printed = python(
        """
        from miles_api.compat import translate
        print(translate("slime.rollout.data_source.pop_first"))
        from slime.utils.types import Sample
        print(Sample.replace(" ", "_"))
        try:
            import slime.rollout
        except ModuleNotFoundError as error:
            print(error.name)
        """,
        tmp_path,
    )
    assert printed == ["slime.rollout.data_source.pop_first", "the_real_one", "slime.rollout"]


def test_a_folder_that_only_has_the_name_is_not_a_package(tmp_path):
    (tmp_path / "slime" / "data").mkdir(parents=True)
    printed = python(
        """
        from miles_api.compat import translate
        print(translate("slime.utils.types.Sample"))
        from slime.utils.types import Sample
        print(Sample.__module__)
        """,
        tmp_path,
    )
    assert printed == ["miles_api:Sample", "miles_api.sample"]


@pytest.mark.parametrize(
    ("statement", "nearest"),
    [
        ("from slime.utils.misc import load_functon", "slime.utils.misc.load_function"),
        ("import miles.utils.http_util", "miles.utils.http_utils"),
        ("from slime.backends.training_utils.cp_utils import slice_with_cp", "slime.backends.megatron_utils"),
        ("from slime.rollout.nowhere import generate", "slime.rollout"),
    ],
)
def test_a_name_outside_the_table_is_an_import_error_with_the_nearest_one(statement, nearest):
    install()
    with pytest.raises(ImportError, match=r"has no '.*; the nearest it has is") as error:
        exec(statement)
    assert nearest in str(error.value)


def test_looking_for_an_attribute_of_an_older_module_is_no_error():
    install()
    import slime

    assert not hasattr(slime.utils.misc, "function_registry")
    assert not hasattr(slime, "__version__")
    assert "misc" in dir(slime.utils)
    assert "load_function" not in dir(slime.utils)
    # pickle asks every imported module for a function that does not say where it is from.
    del (orphan := lambda: None).__module__
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(orphan)


@pytest.mark.parametrize("reference", ["dapo", "/data/slime.utils.types.py:fn", "miles_hooks.rewards.fn", "slimes.a.b"])
def test_other_references_stay_as_they_are(reference):
    assert translate(reference) == reference


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("mark", [".", ":"])
def test_default_paths_of_older_stacks_are_flag_values(root, mark):
    for name, ours in FLAG_VALUES.items():
        assert translate(f"{root}." + mark.join(name.rsplit(".", 1))) == ours
    assert load(f"{root}.utils.types{mark}Sample") is Sample


def test_an_older_name_in_a_flag_that_is_not_in_the_table_names_flag_and_nearest():
    with pytest.raises(HookLoadError, match=r"--custom-rm-path slime\.rollout\.rm_hub\.asinc_rm: .*'async_rm'"):
        load("slime.rollout.rm_hub.asinc_rm")


def test_a_name_that_needs_an_engine_package_says_so_where_none_is_installed(monkeypatch):
    install()
    monkeypatch.setattr("miles_api.loading.load.entry_points", lambda group: {})
    with pytest.raises(ImportError, match=r"needs an engine package.*'batched_async_rm'"):
        _ = importlib.import_module("miles_api.compat.engine").batched_async_rm


def test_load_function_takes_any_form_of_reference(tmp_path):
    install()
    from slime.utils.misc import load_function

    (tmp_path / "more.py").write_text("def fn(): return 3\n")
    assert load_function(None) is None
    assert load_function(f"{tmp_path}/more.py:fn")() == 3
    assert load_function("miles.utils.types.Sample") is Sample


def test_a_singleton_is_built_once():
    install()
    from miles.utils.misc import SingletonMeta

    class One(metaclass=SingletonMeta):
        def __init__(self, value):
            self.value = value

    assert One(1) is One(2)
    assert One(2).value == 1


def test_run_waits_for_a_coroutine_in_another_loop():
    install()
    from slime.utils.async_utils import run

    async def three():
        return 3

    assert run(three()) == 3


def test_outputs_may_be_built_by_position_and_without_metrics():
    assert RolloutFnTrainOutput([[Sample()]], None).metrics == {}
    assert miles_api.RolloutFnEvalOutput({}, None).metrics == {}
    assert DynamicFilterOutput(True, "why") == DynamicFilterOutput(keep=True, reason="why")
    assert miles_api.GenerateFnOutput([]).samples == []


def test_a_verdict_of_one_tensor_value_is_a_plain_bool():
    class Truth:
        def item(self):
            return True

    assert DynamicFilterOutput(keep=Truth()).keep is True


def test_filters_are_called_and_counted_the_older_way():
    install()
    from slime.rollout.filter_hub.base_types import MetricGatherer, call_dynamic_filter

    assert call_dynamic_filter(None, None, []).keep
    assert call_dynamic_filter(lambda args, samples: False, None, []) == DynamicFilterOutput(False)
    gatherer = MetricGatherer()
    for reason in ("zero_std", "zero_std", None):
        gatherer.on_dynamic_filter_drop(reason)
    assert gatherer.collect() == {"rollout/dynamic_filter/drop_zero_std": 2}


def test_a_data_source_may_leave_out_taking_groups_back():
    install()
    from miles.rollout.data_source import DataSource

    class Source(DataSource):
        def __init__(self, args): ...
        def get_samples(self, num_samples): ...
        def save(self, rollout_id): ...
        def load(self, rollout_id=None): ...

    assert bound("data_source", Source).constructs
    with pytest.raises(RuntimeError, match="Source takes no groups back"):
        Source(None).add_samples([])


def test_a_sample_takes_tokens_and_meta_info_in_slimes_form():
    sample = Sample(tokens=[1], response="", loss_mask=[])
    mask = sample.loss_mask
    meta = {"finish_reason": {"type": "length"}, "weight_version": "3", "cached_tokens": 1, "prompt_tokens": 4}
    sample.append_response_tokens(None, tokens=[2, 3], log_probs=[-1.0, -2.0], trainable=True, meta_info=meta)
    sample.append_response_tokens(None, tokens=[4], trainable=False, text=None)
    assert (sample.tokens, sample.response_length, sample.status) == ([1, 2, 3, 4], 3, Sample.Status.TRUNCATED)
    assert (sample.rollout_log_probs, sample.weight_versions) == ([-1.0, -2.0, 0.0], ["3"])
    # slime's hooks keep the list they started with.
    assert mask is sample.loss_mask
    assert mask == [1, 1, 0]
    sample.update_from_meta_info(None, {"finish_reason": {"type": "stop"}})
    assert sample.status is Sample.Status.COMPLETED


def test_counts_of_a_sample_can_be_added_to():
    sample = Sample()
    sample.spec_info.add(
        {"spec_verify_ct": 2, "completion_tokens": 6, "spec_accept_token_num": 3, "spec_draft_token_num": 4}
    )
    sample.prefix_cache_info.add(meta_info={"cached_tokens": 1, "prompt_tokens": 4})
    assert (sample.spec_info.spec_accept_length, sample.spec_info.spec_accept_rate) == (3.0, 0.75)
    assert sample.prefix_cache_info.prefix_cache_hit_rate == 0.25


def test_options_that_only_older_stacks_have_read_as_what_is_true_here():
    args = Args({"rollout_num_engines": 3, "qkv_format": "bshd"})
    assert (args.partial_rollout, args.rollout_global_dataset, args.rollout_num_gpus) == (False, True, 3)
    assert args.qkv_format == "bshd"
    assert "partial_rollout" not in args
    with pytest.raises(AttributeError):
        _ = args.partial_rolout


@pytest.mark.parametrize("extra", ["*, ", "verbose=False, "])
def test_evaluation_may_stand_anywhere_in_a_rollout_function(extra):
    namespace = {}
    exec(f"def fn(args, rollout_id, data_buffer, {extra}evaluation=False): return evaluation", namespace)
    hook = bound("rollout", namespace["fn"])
    assert hook(None, 0, None, True) is True
    assert hook.target.__wrapped__ is namespace["fn"]


def test_an_async_rollout_function_stays_async():
    async def fn(args, rollout_id, data_source, *, evaluation=False): ...

    assert bound("rollout", fn).is_async


def test_a_generate_hook_whose_first_parameter_is_input_has_the_one_argument_form():
    async def generate(input, retries=3, pause=1.0): ...

    assert bound("generate", generate).form.name == "input"


def test_conversion_takes_rewards_by_position_and_gets_the_columns_that_follow_from_the_samples():
    def slime(args, samples, raw, normalised):
        return {"tokens": [s.tokens for s in samples], "rewards": normalised, "raw_reward": raw}

    def miles(args, samples):
        return {"tokens": [s.tokens for s in samples], "group_indices": [7, 7]}

    samples = [Sample(tokens=[1, 2], index=4, group_index=1), Sample(tokens=[3], index=5, group_index=1, rollout_id=4)]
    columns = bound("convert_samples", slime)(None, samples, raw_rewards=[1, 0], rewards=[0.5, -0.5])
    assert (columns["raw_reward"], columns["rewards"]) == ([1, 0], [0.5, -0.5])
    assert (columns["total_lengths"], columns["rollout_ids"], columns["group_indices"]) == ([2, 1], [4, 4], [1, 1])
    assert bound("convert_samples", miles)(None, samples, raw_rewards=[], rewards=[])["group_indices"] == [7, 7]


def test_a_conversion_of_another_number_of_samples_gets_no_columns():
    hook = bound("convert_samples", lambda args, samples: {"tokens": [[1]]})
    assert hook(None, [], raw_rewards=[], rewards=[]) == {"tokens": [[1]]}


def test_a_data_postprocess_hook_with_args_alone_is_accepted_with_a_warning():
    with pytest.warns(UserWarning, match="mine takes args alone"):
        hook = bound("rollout_data_postprocess", lambda args: args)
    assert hook("args", 0, {}) == "args"


def test_a_loss_hook_may_take_the_parallel_state_second_and_import_its_helpers():
    install()
    from miles.backends.training_utils.loss import get_log_probs_and_entropy
    from miles.backends.training_utils.parallel import get_parallel_state

    def loss(args, parallel_state, batch, logits, sum_of_sample_mean):
        assert get_parallel_state() is parallel_state
        found = get_log_probs_and_entropy(
            logits, args=args, unconcat_tokens=batch["unconcat_tokens"], with_entropy=True
        )
        return found, batch["unconcat_tokens"]

    hook = bound("loss", loss)
    given = {"log_probs_and_entropy": lambda logits, entropy=False: ([logits], [entropy]), "parallel": object()}
    assert hook(None, {"tokens": [[1]]}, "logits", None, **given) == (
        {"log_probs": ["logits"], "entropy": [True]}, [[1]],
    )  # fmt: skip
    with pytest.raises(miles_api.errors.ServiceError, match="while a loss hook is called"):
        get_log_probs_and_entropy("logits")


def test_importance_weights_may_use_the_older_names_and_return_weights():
    def older(args, *, old_log_probs, rollout_log_probs, response_masks, cp_size, **kwargs):
        assert cp_size == 1
        assert kwargs["total_lengths"] == "total_lengths"
        return 2, {"from": old_log_probs}

    hook = bound("importance_weights", older)
    names = REGISTRY["importance_weights"].forms[0].signature.parameters
    given = {**{name: name for name in names}, "pg_loss": 3}
    assert hook(**given) == (6, "loss_masks", {"from": "train_log_probs"})


def test_importance_weights_in_our_form_are_not_wrapped():
    def mine(args, *, pg_loss, train_log_probs, rollout_log_probs, **kwargs): ...

    assert bound("importance_weights", mine).target is mine


def test_an_agent_may_take_its_arguments_by_keyword():
    async def run(*, metadata, prompt, base_url, request_kwargs, retries=2):
        return {"base_url": base_url, "prompt": prompt}

    import asyncio

    assert asyncio.run(bound("agent", run)("url", "hello", {}, {})) == {"base_url": "url", "prompt": "hello"}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("rollout", "def fn(args, rollout_id): ..."),
        ("convert_samples", "def fn(args): ..."),
        ("rollout_data_postprocess", "def fn(args, samples): ..."),
        ("loss", "def fn(args, batch, logits): ..."),
        ("loss", "def fn(args, batch, extra, logits, sum_of_sample_mean): ..."),
        ("importance_weights", "def fn(args, extra, *, old_log_probs): ..."),
        ("agent", "async def fn(*, base_url, prompt): ..."),
        ("generate", "async def fn(input, sample): ..."),
    ],
)
def test_a_hook_that_fits_no_stack_is_refused_with_its_own_signature(name, body):
    namespace = {}
    exec(body, namespace)
    with pytest.raises(HookSignatureError, match=r"it declares: fn\("):
        bound(name, namespace["fn"])


def test_the_origin_of_an_adapted_hook_is_its_own_file(tmp_path):
    (tmp_path / "older.py").write_text("def fn(args, samples): return {}\n")
    from miles_api.loading.bind import resolve

    hook = resolve(REGISTRY["convert_samples"], f"{tmp_path}/older.py:fn")
    assert hook.origin.file == str(tmp_path / "older.py")
    assert hook.target.__module__ == hook.target.__wrapped__.__module__


def test_the_mismatch_example_of_the_older_stacks_means_our_hook_unless_its_file_is_there(tmp_path, monkeypatch):
    old = "examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"
    assert translate(old) == "mis"
    (tmp_path / "examples" / "train_infer_mismatch_helper").mkdir(parents=True)
    (tmp_path / "examples" / "train_infer_mismatch_helper" / "mis.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert translate(old) == old
