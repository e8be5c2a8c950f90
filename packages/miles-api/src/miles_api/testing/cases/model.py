"""Does a model provider return a module? It is called with stand-ins, which a real Megatron model does not accept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from miles_api.testing.case import case
from miles_api.testing.tensors import VOCABULARY, the_torch

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_HF_CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


@case(
    "model_provider",
    acts=True,
    left_out="Megatron: config and process groups are stand-ins, with which GPTModel is not built. Call a provider of "
    "one where a trainer rank has started",
)
def _model_provider(trial: Trial) -> None:
    torch = the_torch(trial)
    config = SimpleNamespace(
        num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=1, kv_channels=8,
        params_dtype=torch.float32, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        context_parallel_size=1, sequence_parallel=False,
    )  # fmt: skip
    for pre, post, stage in ((True, True, "only"), (True, False, "first"), (False, True, "last")):
        with trial.check(f"builds the {stage} pipeline stage"):
            model = trial.call(
                pre_process=pre, post_process=post, vp_stage=None, config=config, hf_config=dict(_HF_CONFIG),
                pg_collection=SimpleNamespace(), args=trial.args,
            )  # fmt: skip
            is_module = isinstance(model, torch.nn.Module)
            trial.require(is_module, f"returned a {type(model).__name__}, not a torch module")
