"""Log-probs and entropies of response tokens: plain torch, finite differences, a split vocabulary, memory."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    logits = logits if logits.dtype == torch.float64 else logits.float()
    for sequence, response in zip(tokens, response_lengths, strict=True):
        end = start + len(sequence)
        rows = torch.log_softmax(logits[start:end] / temperature, -1)[len(sequence) - response - 1 : -1]
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


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1.7])
@pytest.mark.parametrize("chunk_size", [1, 3, 10, 1000, None])
@pytest.mark.parametrize("rows", ["all", "response"])
def test_values_and_gradients_do_not_depend_on_the_size_of_chunks(rows, chunk_size, temperature, entropy):
    tokens, lengths = sequences()
    theirs = make_logits(22, torch.float64).requires_grad_()
    expected, expected_entropies = reference(theirs, tokens, lengths, temperature)
    packed = response_rows(tokens, lengths)
    ours = theirs.detach().clone()
    ours = (ours if rows == "all" else ours[packed]).requires_grad_()
    log_probs, entropies = log_probs_and_entropy(
        ours, tokens, lengths, temperature, entropy=entropy, chunk_size=chunk_size, rows=rows
    )
    got, want = log_probs + (entropies or []), expected + (expected_entropies if entropy else [])
    assert [len(values) for values in log_probs] == lengths
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = torch.arange(float(10 * (1 + entropy)), dtype=torch.float64).cos()
    (torch.cat(got) @ weights).backward()
    (torch.cat(want) @ weights).backward()
    torch.testing.assert_close(ours.grad, theirs.grad if rows == "all" else theirs.grad[packed], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", ["all", "response"])
def test_gradients_match_finite_differences(rows):
    tokens, lengths = sequences()

    def function(logits):
        log_probs, entropies = log_probs_and_entropy(
            logits, tokens, lengths, 0.7, entropy=True, chunk_size=3, rows=rows
        )
        return torch.cat(log_probs), torch.cat(entropies)

    logits = make_logits(19 if rows == "all" else 10, torch.float64, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(function, logits)


class Allocations(TorchDispatchMode):
    """Notes how many numbers each new storage holds."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.kept = []
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                # A storage that is freed would give its address to the next.
                self.kept.append(tensor)
                self.known.add(tensor.untyped_storage().data_ptr())
                self.sizes.append(tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize(("rows", "temperature", "dtype"), [
    ("all", 1.0, torch.float32), ("response", 1.0, torch.float32), ("response", 0.7, torch.float32),
    ("response", 0.7, torch.bfloat16),
])  # fmt: skip
def test_no_tensor_is_larger_than_a_chunk_but_the_one_gradient(rows, temperature, dtype):
    chunk_size, width, tokens, lengths = 2, 512, [torch.arange(40), torch.arange(30)], [38, 26]
    logits = torch.randn(70 if rows == "all" else 64, width).to(dtype).requires_grad_()
    saved = []
    with (
        Allocations(logits) as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        log_probs, entropies = log_probs_and_entropy(
            logits, tokens, lengths, temperature, entropy=True, chunk_size=chunk_size, rows=rows
        )
        loss = (torch.cat(log_probs) + 0.1 * torch.cat(entropies)).sum()
    assert max(forward.sizes) == chunk_size * width
    assert {t.data_ptr() for t in saved if t.numel() > 3 * 64} == {logits.data_ptr()}
    with Allocations(logits) as backward:
        loss.backward()
    assert [size for size in backward.sizes if size > chunk_size * width] == [logits.nbytes // 4]


def test_samples_without_a_response_give_nothing_and_pull_at_nothing():
    for rows in ("all", "response"):
        logits = make_logits(7 if rows == "all" else 0).requires_grad_()
        log_probs, entropies = log_probs_and_entropy(
            logits, [torch.arange(4), torch.arange(3)], [0, 0], 0.7, entropy=True, chunk_size=2, rows=rows
        )
        assert [len(values) for values in log_probs + entropies] == [0] * 4
        (torch.cat(log_probs) + torch.cat(entropies)).sum().backward()
        assert not logits.grad.any()


def test_logits_are_left_as_they_were_and_only_response_rows_get_a_gradient():
    tokens, lengths = sequences()
    logits = make_logits(19).requires_grad_()
    before = logits.detach().clone()
    log_probs, entropies = log_probs_and_entropy(logits, tokens, lengths, 0.7)
    torch.cat(log_probs).sum().backward()
    assert entropies is None
    assert torch.equal(logits.detach(), before)
    touched = logits.grad.abs().sum(-1).nonzero().squeeze(-1).tolist()
    assert touched == response_rows(tokens, lengths).tolist() == [1, 2, 3, 6, 8, 9, 10, 11, 12, 13]


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


@pytest.mark.parametrize("chosen", [1, 7])
def test_entropy_of_a_distribution_with_impossible_tokens_is_finite_and_their_log_prob_is_not(chosen):
    logits = torch.zeros(2, V)
    logits[:, 3:] = float("-inf")
    logits.requires_grad_()
    log_probs, entropies = log_probs_and_entropy(logits, [torch.tensor([0, chosen])], [1], 0.5, entropy=True)
    (torch.cat(entropies) + 1e6 * torch.cat(log_probs)).sum().backward()
    torch.testing.assert_close(entropies[0], torch.tensor([3.0]).log())
    assert torch.isfinite(log_probs[0]).all() == (chosen == 1)
    assert torch.isfinite(logits.grad).all()


def vocabulary():
    """Return logits that two ranks share; the second rank's part of two response rows is all impossible."""
    whole = torch.cat([make_logits(19), torch.full((19, 1), -1.5)], dim=1)
    whole[[1, 8], 6:] = float("-inf")
    # Of very different sizes on the two ranks, too.
    whole[2, 6:] += 300
    return whole


SPLIT = {"all": {"rows": "all"}, "response": {"rows": "response"}, "cold": {"rows": "response", "temperature": 0.3}}


def split_case(whole, name):
    """Return logits, and the keywords of a call, for one of `SPLIT`."""
    keywords = {"temperature": 0.8} | SPLIT[name]
    tokens, lengths = sequences()
    # Possible ones, in the rows of which only the first rank's part is possible.
    tokens[0][2], tokens[2][1] = 3, 4
    whole = whole if keywords["rows"] == "all" else whole[response_rows(tokens, lengths)]
    return whole, {"tokens": tokens, "response_lengths": lengths, "entropy": True} | keywords


def _vocabulary_parallel_rank(rank, world, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name in SPLIT:
        whole, keywords = split_case(vocabulary(), name)
        part = whole.chunk(world, dim=1)[rank].clone().requires_grad_()
        # The number of collectives does not depend on how many chunks a rank takes.
        group = {"tp_group": dist.group.WORLD, "chunk_size": 1 + 3 * rank}
        log_probs, entropies = log_probs_and_entropy(part, **keywords, **group)
        (torch.cat(log_probs) + 0.3 * torch.cat(entropies)).sum().backward()
        torch.save((torch.cat(log_probs).detach(), torch.cat(entropies).detach(), part.grad), f"{out}/{name}-{rank}.pt")
        nothing = log_probs_and_entropy(part[:0], keywords["tokens"], [0] * 4, 1.0, rows="response", **group)
        assert [len(values) for values in nothing[0]] == [0] * 4
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Compute every case on two ranks; starting processes costs most, so one pair of them runs all."""
    out = tmp_path_factory.mktemp("split")
    mp.spawn(_vocabulary_parallel_rank, args=(2, out / "store", out), nprocs=2)
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="gloo file store")
@pytest.mark.parametrize("name", SPLIT)
def test_a_vocabulary_split_over_two_ranks_gives_the_same_values_and_gradients(split, name):
    whole, keywords = split_case(vocabulary(), name)
    whole.requires_grad_()
    log_probs, entropies = log_probs_and_entropy(whole, **keywords)
    (torch.cat(log_probs) + 0.3 * torch.cat(entropies)).sum().backward()
    parts = [torch.load(split / f"{name}-{rank}.pt") for rank in range(2)]
    assert torch.isfinite(torch.cat(log_probs)).all()
    for got_log_probs, got_entropies, _ in parts:
        torch.testing.assert_close(got_log_probs, torch.cat(log_probs).detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(got_entropies, torch.cat(entropies).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 1), whole.grad, rtol=0, atol=2e-6)
