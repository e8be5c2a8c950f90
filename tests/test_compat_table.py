"""Every row of the table of older names can be imported and called the way Miles 0.x and slime call it."""

import importlib
import inspect

import pytest

from miles_api.compat.finder import install
from miles_api.compat.table import FLAG_VALUES, rows
from miles_api.loading.load import find

A = object()
CP = ((A, 3, 2), {"qkv_format": "thd", "max_seq_len": None})
MASKS = (([3], [2], [A]), {"qkv_format": "thd", "max_seq_lens": None})
RM = ((A, A), {})
CALLS = {
    "utils.types.Sample": [((), {"index": 0, "prompt": "", "tokens": [], "reward": None, "status": "completed"})],
    "rollout.base_types.GenerateFnInput": [
        ((), {"state": A, "sample": A, "sampling_params": {}, "evaluation": False}),
    ],
    "rollout.base_types.GenerateFnOutput": [((A,), {}), ((), {"samples": A})],
    "rollout.base_types.RolloutFnConstructorInput": [((), {"args": A, "data_source": A})],
    "rollout.base_types.RolloutFnEvalInput": [((), {"rollout_id": 0})],
    "rollout.base_types.RolloutFnTrainInput": [((), {"rollout_id": 0})],
    "rollout.base_types.RolloutFnEvalOutput": [((), {"data": {}, "metrics": None}), (({},), {})],
    "rollout.base_types.RolloutFnTrainOutput": [((), {"samples": [], "metrics": None}), (([],), {})],
    "rollout.base_types.BaseRolloutFn": [((A,), {})],
    "rollout.base_types.RolloutFnProtocol": [((A,), {})],
    "rollout.base_types.call_rollout_fn": [((A, A, 0, A), {"evaluation": False})],
    "rollout.filter_hub.base_types.DynamicFilterOutput": [((), {"keep": True, "reason": None}), ((True,), {})],
    "rollout.filter_hub.base_types.MetricGatherer": [((), {})],
    "rollout.filter_hub.base_types.call_dynamic_filter": [((None, A, []), {})],
    "rollout.filter_hub.dynamic_sampling_filters.check_no_aborted": [((A, []), {"extra": 1})],
    "rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": [((A, []), {"extra": 1})],
    "rollout.sglang_rollout.GenerateState": [((A,), {})],
    "rollout.sglang_rollout.eval_rollout": [((A, 0), {})],
    "rollout.sglang_rollout.generate": [((A, A, {}), {})],
    "rollout.sglang_rollout.generate_and_rm": [((A, A, {}), {"evaluation": True})],
    "rollout.sglang_rollout.generate_and_rm_group": [((A, []), {"sampling_params": {}, "evaluation": False})],
    "rollout.sglang_rollout.generate_rollout": [((A, 0, A), {"evaluation": False})],
    "rollout.sglang_rollout.get_model_url": [((A, "ref", "/generate"), {})],
    "rollout.inference_rollout.inference_rollout_common.GenerateState": [((A,), {})],
    "rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn": [((A,), {})],
    "rollout.inference_rollout.inference_rollout_common.generate_and_rm": [((A, A, {}), {"evaluation": True})],
    "rollout.inference_rollout.inference_rollout_common.generate_and_rm_group": [((A, [], {}), {"evaluation": True})],
    "rollout.inference_rollout.inference_rollout_common.compute_sampling_params": [
        ((A,), {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 8}),
    ],
    "rollout.generate_hub.single_turn.generate": [((A,), {})],
    "rollout.generate_utils.generate_endpoint_utils.compute_prompt_ids_from_sample": [((A, A), {"tools": None})],
    "rollout.generate_utils.generate_endpoint_utils.compute_request_payload": [
        ((A,), {"input_ids": [], "sampling_params": {}, "multimodal_inputs": None}),
    ],
    "rollout.generate_utils.generate_endpoint_utils.update_sample_from_response": [
        ((A, A), {"payload": {}, "output": {}, "update_loss_mask": True}),
    ],
    "rollout.data_source.DataSource": [((), {})],
    "rollout.data_source.RolloutDataSource": [((A,), {})],
    "rollout.data_source.RolloutDataSourceWithBuffer": [((A,), {})],
    "rollout.data_source.pop_first": [((A, None, [], 1), {})],
    "rollout.rm_hub.async_rm": [RM, ((A, A), {"evaluation": True})],
    "rollout.rm_hub.batched_async_rm": [RM, ((A, []), {"inplace_set_reward_field": True})],
    "rollout.rm_hub.grade_answer_verl": [(("", ""), {})],
    "rollout.rm_hub.remote_rm": [RM],
    "rollout.rm_hub.compute_score_dapo": [(("", ""), {})],
    "rollout.rm_hub.extract_boxed_answer": [(("",), {})],
    "rollout.rm_hub.f1_score": [(("", ""), {})],
    "rollout.rm_hub.f1.f1_score": [(("", ""), {})],
    "rollout.rm_hub.math_utils.extract_answer": [(("",), {})],
    "rollout.rm_hub.math_utils.extract_boxed_answer": [(("",), {})],
    "rollout.rm_hub.math_utils.grade_answer_verl": [(("", ""), {})],
    "rollout.rm_hub.math_utils.last_boxed_only_string": [(("",), {})],
    "rollout.rm_hub.math_utils.remove_boxed": [(("",), {})],
    "rollout.rm_hub.math_dapo_utils.compute_score": [
        (("", ""), {}), ((), {"solution_str": "", "ground_truth": "", "strict_box_verify": True}),
    ],
    "rollout.rm_hub.math_dapo_utils.last_boxed_only_string": [(("",), {})],
    "rollout.rm_hub.math_dapo_utils.remove_boxed": [(("",), {})],
    "utils.http_utils.get": [(("http://x",), {})],
    "utils.http_utils.post": [
        (("u", {}), {}), (("u", {}, 3), {"action": "post", "headers": None}), (("u", {}), {"max_retries": 1}),
    ],
    "utils.misc.SingletonMeta": [],
    "utils.misc.load_function": [((None,), {})],
    "utils.async_utils.run": [((A,), {})],
    "utils.async_utils.get_async_loop": [((), {})],
    "utils.async_utils.eager_create_task": [((A,), {})],
    "utils.processing_utils.load_processor": [(("path",), {"trust_remote_code": True})],
    "utils.processing_utils.load_tokenizer": [
        (("path",), {"trust_remote_code": True}), (("path",), {"chat_template_path": None, "trust_remote_code": True}),
    ],
    "utils.processing_utils.encode_image_for_rollout_engine": [((A,), {})],
    "utils.metric_utils.compute_rollout_step": [((A, 3), {})],
    "utils.metric_utils.compute_statistics": [(([1.0],), {})],
    "utils.metric_utils.dict_add_prefix": [(({}, "rollout/"), {})],
    "utils.environ.enable_experimental_rollout_refactor": [((), {})],
    "utils.ppo_utils.compute_approx_kl": [((A, A, "k1"), {}), ((A, A), {"kl_loss_type": "k1", "importance_ratio": A})],
    "utils.ppo_utils.compute_policy_loss": [((A, A, 0.2, 0.28), {}), ((A, A, 0.2, 0.28, 3.0), {})],
    "backends.training_utils.parallel.get_parallel_state": [((), {})],
}  # fmt: skip
for old, calls in {
    "gpqa.compute_gpqa_reward": [(("", "A"), {"metadata": {}})],
    "ifbench.compute_ifbench_reward": [(("", ""), {"metadata": {}})],
    "deepscaler.get_deepscaler_rule_based_reward": [(("", ""), {})],
}.items():
    CALLS |= {f"rollout.rm_hub.{old}": calls, f"rollout.rm_hub.{old.partition('.')[2]}": calls}
for module in ("training_utils", "megatron_utils"):
    CALLS |= {
        f"backends.{module}.cp_utils.all_gather_with_cp": [CP, ((A, 3, 2), {}), ((A, 3, 2, "thd", None), {})],
        f"backends.{module}.cp_utils.slice_log_prob_with_cp": [((A, 3, 2, "thd", None), {}), ((A, 3, 2), {})],
        f"backends.{module}.cp_utils.slice_with_cp": [((A, 0, "thd"), {"max_seq_len": None}), ((A, 0), {})],
        f"backends.{module}.cp_utils.get_sum_of_sample_mean": [MASKS, (([3], [2], [A], False, "thd", None), {})],
        f"backends.{module}.cp_utils.get_local_response_loss_masks": [MASKS],
        f"backends.{module}.cp_utils.slice_loss_masks_for_local_cp": [(([A], [3], [2]), {"qkv_format": "thd"})],
        f"backends.{module}.cp_utils.get_chunked_loss_masks": [(([3], [2], [A]), {"cp_rank": 0, "cp_size": 1})],
        f"backends.{module}.loss.get_log_probs_and_entropy": [
            ((A,), {"args": A, "unconcat_tokens": [], "total_lengths": [], "response_lengths": [],
                    "with_entropy": True, "max_seq_lens": None}),
        ],
    }  # fmt: skip
TYPES = {
    "utils.types.RolloutBatch", "rollout.base_types.RolloutFnInput", "rollout.base_types.RolloutFnOutput",
    "backends.training_utils.parallel.ParallelState",
}  # fmt: skip
"""Names for annotations."""


@pytest.mark.parametrize("old", [old for old, _ in rows()])
def test_an_older_name_is_there_and_takes_the_older_calls(old):
    install()
    module, _, attribute = old.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    name = old.partition(".")[2]
    if name in TYPES:
        return
    if isinstance(found, type) and issubclass(found, type):
        assert isinstance(found("Name", (), {}), type)
        return
    signature = inspect.signature(found)
    for positional, keywords in CALLS[name]:
        signature.bind(*positional, **keywords)


def test_no_call_is_left_over_for_a_name_that_is_gone():
    names = {old.partition(".")[2] for old, _ in rows()}
    assert set(CALLS) | TYPES == names


@pytest.mark.parametrize("root", ["miles", "slime"])
@pytest.mark.parametrize(("name", "hook"), [(name, name.rsplit(".", 1)[-1]) for name in FLAG_VALUES])
def test_every_default_path_names_something_of_ours(root, name, hook):
    group = "miles.hooks.generate" if "generate_hub" in name else "miles.hooks.rollout"
    found = find(f"{root}.{name}", short_names=group, flag="--flag").target
    assert found.__module__.startswith("miles_rollout.")
