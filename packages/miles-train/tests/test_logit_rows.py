"""Which logits a training step computes: those of response tokens, and all for a loss hook."""

from __future__ import annotations

from importlib import import_module

import pytest

from miles_train.megatron.core import unwrap

tiny = import_module("packages.miles-train.tests.tiny_trainer")


@pytest.mark.parametrize(
    ("run", "functions"),
    [({}, {}), ({"loss_type": "sft_loss"}, {}), ({"loss_type": "custom_loss"}, {"loss": "ppo_loss"})],
)
def test_no_logits_of_prompts_are_computed_unless_a_loss_hook_gets_them(hf_dir, run, functions):
    batch, passes = tiny.make_batch(), []
    with tiny.Started(tiny.make_config(hf_dir, tiny.hooked(**functions), **run)) as trainer:
        head = unwrap(trainer._model).output_layer
        head.register_forward_hook(lambda _head, _inputs, outputs: passes.append(len(outputs[0])))
        trainer.train(0, batch)
    responses, tokens = sum(batch["response_lengths"]), sum(map(len, batch["tokens"]))
    if run.get("loss_type") == "sft_loss":
        assert sum(passes) == responses
    elif functions:
        # Old log-probs of all samples, for the hook, and then two steps.
        assert [passes[0], sum(passes[1:])] == [responses, tokens]
    else:
        # Old log-probs of the second step's samples, and then two steps.
        assert [passes[0], sum(passes[1:])] == [passes[-1], responses]
