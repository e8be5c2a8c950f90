"""Log-probs and entropies of response tokens, against plain torch, finite differences and a split vocabulary."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from miles_train.log_probs import log_probs_and_entropy, response_rows

V = 11


def sequences():
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, V, (n,), generator=generator) for n in (5, 3, 7, 4)]
    return tokens, [3, 1, 6, 0]


def make_logits(rows, dtype=torch.float32, scale=4.0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64).mul(scale).to(dtype)


def reference(logits, tokens, response_lengths, temperature):
    log_probs, entropies, start = [], [], 0
    for sequence, response in zip(tokens, response_lengths, strict=True):
        end = start + len(sequence)
        rows = torch.log_softmax(logits[start:end].float() / temperature, -1)[len(sequence) - response - 1 : -1]
        log_probs.append(rows.gather(-1, sequence[len(sequence) - response :, None]).squeeze(-1))
        entropies.append(-(rows.exp() * rows).sum(-1))
        start = end
    return log_probs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_plain_torch(temperature):
    tokens, lengths = sequences()
    ours, theirs = (make_logits(22).requires_grad_() for _ in range(2))  # 3 rows of padding at the end
    log_probs, entropies = log_probs_and_entropy(ours, tokens, lengths, temperature, entropy=True)
    expected, expected_entropies = reference(theirs, tokens, lengths, temperature)
    weights = torch.arange(10.0)
    for got, want in zip(log_probs + entropies, expected + expected_entropies, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    (torch.cat(log_probs) @ weights + torch.cat(entropies) @ weights.flip(0)).backward()
    (torch.cat(expected) @ weights + torch.cat(expected_entropies) @ weights.flip(0)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_gradients_match_finite_differences():
    tokens, lengths = sequences()

    def function(logits):
        log_probs, entropies = log_probs_and_entropy(logits, tokens, lengths, 0.7, entropy=True)
        return torch.cat(log_probs), torch.cat(entropies)

    assert torch.autograd.gradcheck(function, make_logits(19, torch.float64, 1.0).requires_grad_())


def test_logits_are_left_as_they_were_and_only_response_rows_get_a_gradient():
    tokens, lengths = sequences()
    logits = make_logits(19).requires_grad_()
    before = logits.detach().clone()
    log_probs, entropies = log_probs_and_entropy(logits, tokens, lengths, 0.7)
    torch.cat(log_probs).sum().backward()
    assert entropies is None
    assert torch.equal(logits.detach(), before)
    touched = logits.grad.abs().sum(-1).nonzero().squeeze(-1).tolist()
    assert touched == response_rows(tokens, lengths)[0].tolist() == [1, 2, 3, 6, 8, 9, 10, 11, 12, 13]


def test_an_entropy_that_is_only_looked_at_changes_no_gradient_and_may_be_all_that_has_one():
    tokens, lengths = sequences()
    logits = make_logits(19).requires_grad_()
    torch.cat(log_probs_and_entropy(logits, tokens, lengths, 0.7)[0]).sum().backward()
    plain, logits.grad = logits.grad, None
    log_probs, entropies = log_probs_and_entropy(logits, tokens, lengths, 0.7, entropy=True)
    (bonus,) = torch.autograd.grad(torch.cat(entropies).sum(), logits, retain_graph=True)
    torch.cat(log_probs).sum().backward()
    assert torch.equal(logits.grad, plain)
    logits.grad = None
    torch.cat(reference(logits, tokens, lengths, 0.7)[1]).sum().backward()
    torch.testing.assert_close(bonus, logits.grad, rtol=0, atol=1e-5)


def test_half_precision_logits_are_computed_in_fp32_and_get_a_gradient_of_their_own_type():
    tokens, lengths = sequences()
    logits = make_logits(19, torch.bfloat16).requires_grad_()
    log_probs, _ = log_probs_and_entropy(logits, tokens, lengths, 1.0)
    torch.testing.assert_close(torch.cat(log_probs), torch.cat(reference(logits, tokens, lengths, 1.0)[0]))
    torch.cat(log_probs).sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_entropy_of_a_distribution_with_impossible_tokens_is_finite():
    logits = torch.zeros(2, V)
    logits[:, 3:] = float("-inf")
    logits.requires_grad_()
    _, entropies = log_probs_and_entropy(logits, [torch.tensor([0, 1])], [1], 1.0, entropy=True)
    torch.cat(entropies).sum().backward()
    torch.testing.assert_close(entropies[0], torch.tensor([3.0]).log())
    assert torch.isfinite(logits.grad).all()


def _vocabulary_parallel_rank(rank, world, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    tokens, lengths = sequences()
    whole = torch.cat([make_logits(19), torch.full((19, 1), -1.5)], dim=1)
    part = whole.chunk(world, dim=1)[rank].clone().requires_grad_()
    log_probs, entropies = log_probs_and_entropy(part, tokens, lengths, 0.8, entropy=True, tp_group=dist.group.WORLD)
    (torch.cat(log_probs) + 0.3 * torch.cat(entropies)).sum().backward()
    torch.save((torch.cat(log_probs).detach(), torch.cat(entropies).detach(), part.grad), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo file store")
def test_a_vocabulary_split_over_two_ranks_gives_the_same_values_and_gradients(tmp_path):
    mp.spawn(_vocabulary_parallel_rank, args=(2, tmp_path / "store", tmp_path), nprocs=2)
    tokens, lengths = sequences()
    whole = torch.cat([make_logits(19), torch.full((19, 1), -1.5)], dim=1).requires_grad_()
    log_probs, entropies = reference(whole, tokens, lengths, 0.8)
    (torch.cat(log_probs) + 0.3 * torch.cat(entropies)).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for got_log_probs, got_entropies, _ in parts:
        torch.testing.assert_close(got_log_probs, torch.cat(log_probs).detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(got_entropies, torch.cat(entropies).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 1), whole.grad, rtol=0, atol=1e-6)
