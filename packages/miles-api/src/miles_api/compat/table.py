"""The one table of old names: what `miles.X` and `slime.X` are here, for imports and for flag values."""

from __future__ import annotations

import difflib
import functools
import itertools

__all__ = ["EXAMPLES", "FLAG_VALUES", "ROOTS", "ROWS", "modules_of", "nearest", "row_of", "rows"]

ROOTS = ("miles", "slime")


def _all(module: str, target: str, *names: str) -> dict[str, str]:
    return {f"{module}.{name}": f"{target}:{name}" for name in names}


_API = "miles_api"
_ENGINE = "miles_api.compat.engine"
_TYPES = "miles_api.compat.types"
_TENSORS = "miles_api.compat.tensors"
_FUNCTIONS = "miles_api.compat.functions"
_REQUESTS = "miles_api.compat.requests"

_CP = (
    "all_gather_with_cp", "get_chunked_loss_masks", "get_local_response_loss_masks", "get_sum_of_sample_mean",
    "slice_log_prob_with_cp", "slice_loss_masks_for_local_cp", "slice_with_cp",
)  # fmt: skip
_GRADERS = ("extract_answer", "grade_answer_verl", "last_boxed_only_string", "remove_boxed")
_BY_KIND = (
    ("gpqa.", "compute_gpqa_reward"), ("ifbench.", "compute_ifbench_reward"),
    ("deepscaler.", "get_deepscaler_rule_based_reward"),
)  # fmt: skip
_LEGACY_ROLLOUT = (
    "GenerateState", "eval_rollout", "generate", "generate_and_rm", "generate_and_rm_group", "generate_rollout",
)  # fmt: skip

_BOTH = {
    **_all("utils.types", _API, "Sample"),
    **_all("utils.types", _TYPES, "RolloutBatch"),
    **_all(
        "rollout.base_types", _API, "GenerateFnInput", "GenerateFnOutput", "RolloutFnConstructorInput",
        "RolloutFnEvalInput", "RolloutFnEvalOutput", "RolloutFnTrainInput", "RolloutFnTrainOutput",
    ),
    **_all(
        "rollout.base_types", _TYPES, "BaseRolloutFn", "RolloutFnInput", "RolloutFnOutput", "RolloutFnProtocol",
        "call_rollout_fn",
    ),
    **_all("rollout.filter_hub.base_types", _API, "DynamicFilterOutput"),
    **_all("rollout.filter_hub.base_types", _TYPES, "MetricGatherer", "call_dynamic_filter"),
    **_all(
        "rollout.filter_hub.dynamic_sampling_filters", _ENGINE, "check_no_aborted", "check_reward_nonzero_std",
    ),
    **_all("rollout.sglang_rollout", _ENGINE, *_LEGACY_ROLLOUT),
    **_all("rollout.sglang_rollout", _FUNCTIONS, "get_model_url"),
    **_all("rollout.data_source", _TYPES, "DataSource"),
    **_all("rollout.data_source", _ENGINE, "RolloutDataSource", "RolloutDataSourceWithBuffer", "pop_first"),
    **_all("rollout.rm_hub", _ENGINE, "async_rm", "batched_async_rm", "grade_answer_verl", "remote_rm"),
    **{f"rollout.rm_hub.{within}{name}": f"{_ENGINE}:{name}" for module, name in _BY_KIND for within in ("", module)},
    "rollout.rm_hub.compute_score_dapo": f"{_ENGINE}:compute_score",
    "rollout.rm_hub.extract_boxed_answer": f"{_ENGINE}:extract_answer",
    "rollout.rm_hub.f1_score": f"{_ENGINE}:f1_score",
    "rollout.rm_hub.f1.f1_score": f"{_ENGINE}:f1_score",
    **_all("rollout.rm_hub.math_utils", _ENGINE, *_GRADERS),
    "rollout.rm_hub.math_utils.extract_boxed_answer": f"{_ENGINE}:extract_answer",
    **_all("rollout.rm_hub.math_dapo_utils", _ENGINE, "compute_score", "last_boxed_only_string", "remove_boxed"),
    **_all("utils.http_utils", _ENGINE, "get", "post"),
    **_all("utils.misc", _FUNCTIONS, "SingletonMeta", "load_function"),
    **_all("utils.async_utils", _FUNCTIONS, "eager_create_task", "get_async_loop", "run"),
    **_all("utils.processing_utils", _ENGINE, "load_processor", "load_tokenizer"),
    **_all("utils.processing_utils", _FUNCTIONS, "encode_image_for_rollout_engine"),
    **_all("utils.metric_utils", _FUNCTIONS, "compute_rollout_step", "compute_statistics", "dict_add_prefix"),
    **_all("backends.megatron_utils.cp_utils", _TENSORS, *_CP),
    **_all("utils.ppo_utils", _TENSORS, "compute_approx_kl", "compute_policy_loss"),
}  # fmt: skip

ROWS: dict[str, dict[str, str]] = {
    "miles": {
        **_BOTH,
        **_all(
            "rollout.inference_rollout.inference_rollout_common", _ENGINE, "GenerateState", "InferenceRolloutFn",
            "compute_sampling_params",
        ),
        "rollout.inference_rollout.inference_rollout_common.generate_and_rm": f"{_ENGINE}:state_generate_and_rm",
        "rollout.inference_rollout.inference_rollout_common.generate_and_rm_group":
            f"{_ENGINE}:state_generate_and_rm_group",
        "rollout.generate_hub.single_turn.generate": f"{_ENGINE}:single_turn_generate",
        **_all(
            "rollout.generate_utils.generate_endpoint_utils", _REQUESTS, "compute_prompt_ids_from_sample",
            "compute_request_payload", "update_sample_from_response",
        ),
        **_all("utils.environ", _FUNCTIONS, "enable_experimental_rollout_refactor"),
        **_all("backends.training_utils.cp_utils", _TENSORS, *_CP),
        **_all("backends.training_utils.loss", _TENSORS, "get_log_probs_and_entropy"),
        **_all("backends.megatron_utils.loss", _TENSORS, "get_log_probs_and_entropy"),
        **_all("backends.training_utils.parallel", _TENSORS, "ParallelState", "get_parallel_state"),
    },
    "slime": {
        **_BOTH,
        # slime's own gives the logits' part of its result first.
        "backends.megatron_utils.loss.get_log_probs_and_entropy": f"{_TENSORS}:slime_log_probs_and_entropy",
    },
}  # fmt: skip
"""By root, then by the name below it; the value is where the object is here, `module:name`."""

FLAG_VALUES = {
    "rollout.sglang_rollout.generate_rollout": f"{_ENGINE}:InferenceRolloutFn",
    "rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn": f"{_ENGINE}:InferenceRolloutFn",
    "rollout.sft_rollout.generate_rollout": f"{_ENGINE}:sft_rollout",
    "rollout.sglang_rollout.generate": f"{_ENGINE}:single_turn_generate",
    "rollout.generate_hub.multi_turn.generate": "multi_turn",
    "rollout.generate_hub.agentic_tool_call.generate": "agentic",
    "rollout.data_source.RolloutDataSource": f"{_ENGINE}:default_data_source",
    "rollout.data_source.RolloutDataSourceWithBuffer": f"{_ENGINE}:default_data_source",
}
"""What a flag means by an old default path, where that is not what an import of the name gives."""

EXAMPLES = dict.fromkeys(
    (
        f"examples.{folder}train_infer_mismatch_helper.mis.compute_mis_weights_{form}"
        for folder in ("", "infra_features.")
        for form in ("with_cp", "fsdp")
    ),
    "mis",
)
"""What a flag means by the path of an example of the older stacks, where that file is not importable."""


def rows() -> list[tuple[str, str]]:
    """Return every row as (old dotted name, ours)."""
    return [(f"{root}.{name}", target) for root in ROOTS for name, target in ROWS[root].items()]


def row_of(root: str, name: str) -> str | None:
    """Return where `root.name` is here, None if it is not in the table."""
    return ROWS[root].get(name)


@functools.cache
def modules_of(root: str) -> frozenset[str]:
    """Return the dotted names of all modules that the table fills, `root` itself included."""
    paths = [f"{root}.{name}".split(".")[:-1] for name in ROWS[root]]
    return frozenset(".".join(part) for path in paths for part in itertools.accumulate([[p] for p in path]))


def nearest(dotted: str) -> str:
    """Return what is most like `dotted`, a name outside the table: a row of the same last part, if there is one."""
    root = dotted.partition(".")[0]
    names = [f"{root}.{name}" for name in ROWS[root]]
    last = dotted.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    return max(
        same or [*names, *modules_of(root)], key=lambda name: difflib.SequenceMatcher(None, name, dotted).ratio()
    )
