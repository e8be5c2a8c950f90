from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles_rollout.engines.local.errors import UnsupportedModelError
from miles_rollout.engines.local.lean_config import LeanConfig
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.scheduler import Limits, Scheduler
from miles_rollout.engines.local.tokenizer import TextCodec
from miles_rollout.engines.protocol import FinishReason

KINDS = ("qwen3", "qwen2", "llama", "llama3")


def log_probs(model, ids, start, temperature=1.0):
    logits = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None]).squeeze(1)


@pytest.mark.parametrize("impl", ["lean", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_a_mixed_batch_equal_generate_one_by_one(kit, make_job, drain, prompts, kind, impl):
    jobs = [make_job(ids, max_new_tokens=20) for ids in prompts]
    drain(kit.scheduler(kind, impl), *jobs)
    for job in jobs:
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = kit.reference(kind).generate(torch.tensor([job.ids]), **options)[0, len(job.ids) :].tolist()
        assert job.output_ids == expected
        assert job.finish == FinishReason(type="length", length=20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_output_log_probs_are_those_of_the_temperature_scaled_distribution(
    kit, make_job, drain, prompts, kind, temperature
):
    jobs = [make_job(ids, temperature=temperature, seed=i, max_new_tokens=12) for i, ids in enumerate(prompts)]
    drain(kit.scheduler(kind), *jobs)
    for job in jobs:
        expected = log_probs(kit.reference(kind), job.ids + job.output_ids, len(job.ids), temperature)
        torch.testing.assert_close(torch.tensor(job.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_greedy_log_probs_are_reported_at_temperature_one(kit, make_job, drain, prompts):
    job = make_job(prompts[0])
    drain(kit.scheduler(), job)
    expected = log_probs(kit.reference("qwen3"), job.ids + job.output_ids, len(job.ids))
    torch.testing.assert_close(torch.tensor(job.logprobs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["lean", "hf"])
def test_prompt_log_probs_start_with_null_and_are_not_scaled_by_the_temperature(kit, make_job, drain, prompts, impl):
    whole = make_job(prompts[4], temperature=0.5, prompt_logprob_start=0)
    tail = make_job(prompts[4], temperature=0.5, prompt_logprob_start=10)
    drain(kit.scheduler(impl=impl), whole, tail)
    expected = log_probs(kit.reference("qwen3"), whole.ids, 1)
    assert whole.prompt_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(whole.prompt_logprobs[1:]), expected, atol=1e-5, rtol=1e-5)
    assert tail.prompt_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(tail.prompt_logprobs[1:]), expected[10:], atol=1e-5, rtol=1e-5)


def test_both_implementations_draw_the_same_tokens_with_the_same_seeds(kit, make_job, drain, prompts):
    drawn = []
    for impl in ("lean", "hf"):
        jobs = [make_job(ids, temperature=1.0, seed=100 + i, max_new_tokens=16) for i, ids in enumerate(prompts)]
        drain(kit.scheduler(impl=impl), *jobs)
        drawn.append([job.output_ids for job in jobs])
    assert drawn[0] == drawn[1]


def test_a_mixture_of_experts_runs_through_transformers(kit, make_job, drain, prompts, tmp_path):
    torch.manual_seed(0)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(vocab_size=41, intermediate_size=48, max_position_embeddings=128, **small, **moe)
    shutil.copytree(kit.directory("qwen3"), tmp_path, dirs_exist_ok=True)
    model = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    scheduler = Scheduler(load_model(tmp_path, "auto", None), TextCodec(tmp_path), Limits())
    assert scheduler.model.impl == "hf"
    jobs = [make_job(ids, temperature=1.0, seed=i) for i, ids in enumerate(prompts)]
    drain(scheduler, *jobs)
    for job in jobs:
        expected = log_probs(model, job.ids + job.output_ids, len(job.ids))
        torch.testing.assert_close(torch.tensor(job.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_a_sliding_window_is_refused_unless_no_sequence_can_outgrow_it(kit, tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"max_position_embeddings": 128, "sliding_window": 32}
    MistralForCausalLM(MistralConfig(vocab_size=41, intermediate_size=48, **small, **limits)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"sliding_window=32 .* --max-total-len 32 is exact"):
        load_model(tmp_path, "auto", None)
    assert load_model(tmp_path, "auto", 32).max_positions == 32


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"use_sliding_window": True, "sliding_window": 16},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"attention_multiplier": 0.1},
    ],
)
def test_the_lean_forward_declines_what_changes_the_maths(kit, tmp_path, change):
    config = json.loads((kit.directory("qwen3") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match="the lean forward does not cover"):
        LeanConfig.read(tmp_path, None)
