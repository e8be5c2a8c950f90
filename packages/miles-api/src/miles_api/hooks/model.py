"""Model hooks: what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args


@hook(
    flag="--custom-model-provider-path",
    since=(1, 0),
    side="train",
    moment="start",
    by_keyword=True,
    default="a GPTModel built from the Hugging Face config",
)
def model_provider(
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    *,
    config: Any,
    hf_config: dict[str, Any],
    pg_collection: Any,
    args: Args,
) -> Any:
    """Build the Megatron model of one pipeline stage.

    Called by keyword, once per virtual stage on every rank. Return a GPTModel without weights: the framework loads
    them, wraps the model and adds a critic's head. `config` is Megatron's TransformerConfig, `hf_config` the
    checkpoint's `config.json`, `pg_collection` Megatron's ProcessGroupCollection. The default, to be called with the
    same keywords and changed, is `miles_train.megatron.model.gpt_model`.
    """
    raise NotImplementedError
