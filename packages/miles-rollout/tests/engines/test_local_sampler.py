from __future__ import annotations

import pytest
import torch

from miles_rollout.engines.local.sampler import SamplingRows, Truncation, sample, uniforms

DRAWS = 40_000


def numbers(count):
    return uniforms(torch.arange(count), torch.full((count,), 3))


def rows(count, vocabulary, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    top_k = top_k or vocabulary
    return SamplingRows(
        temperature=torch.full((count,), temperature or 1.0),
        greedy=torch.full((count,), temperature == 0),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        any_scaled=temperature not in (0, 1.0),
        any_greedy=temperature == 0,
        all_greedy=temperature == 0,
        truncated=[Truncation(None, top_k)] if top_k < vocabulary or top_p < 1 or min_p > 0 else [],
    )


def chi_square_fits(tokens, probs):
    """Compare counts with probabilities; the bound is the mean plus five deviations of the statistic."""
    expected = probs * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs)).float()
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocabulary", [7, 300, 1500])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_follow_the_scaled_distribution(vocabulary, temperature):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits.repeat(DRAWS, 1), rows(DRAWS, vocabulary, temperature), numbers(DRAWS))
    scaled = (logits / temperature).log_softmax(-1)
    assert chi_square_fits(tokens, scaled.exp())
    torch.testing.assert_close(log_probs, scaled[tokens], atol=1e-5, rtol=1e-5)


def test_truncated_draws_follow_the_renormalised_rest_and_report_the_untruncated_log_prob():
    probs = torch.tensor([0.05, 0.3, 0.1, 0.25, 0.2, 0.1])
    log_probs = probs.log()
    cases = [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.56}, [1, 3, 4]),
        ({"min_p": 0.6}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
    ]
    for options, kept in cases:
        tokens, got = sample(log_probs.repeat(DRAWS, 1), rows(DRAWS, 6, **options), numbers(DRAWS))
        rest = torch.zeros(6)
        rest[kept] = probs[kept]
        assert chi_square_fits(tokens, rest / rest.sum()), options
        torch.testing.assert_close(got, log_probs[tokens], atol=1e-5, rtol=1e-5)


def test_draws_at_successive_positions_of_one_seed_are_independent():
    positions = torch.arange(DRAWS)
    values = uniforms(torch.zeros(DRAWS, dtype=torch.int64), positions)
    pairs = (values[:-1] * 4).long() * 4 + (values[1:] * 4).long()
    assert chi_square_fits(pairs, torch.full((16,), 1 / 16))
    assert values.min() >= 0
    assert values.max() < 1


def test_a_row_draws_the_same_token_whatever_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 1500, generator=generator)
    together, _ = sample(logits.clone(), rows(64, 1500), numbers(64))
    for row in range(0, 64, 7):
        number = uniforms(torch.tensor([row]), torch.tensor([3]))
        alone, _ = sample(logits[row : row + 1].clone(), rows(1, 1500), number)
        assert alone == together[row]


@pytest.mark.parametrize("vocabulary", [7, 1500])
def test_a_greedy_row_takes_the_most_likely_token(vocabulary):
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(2))
    tokens, _ = sample(logits.clone(), rows(50, vocabulary, temperature=0), numbers(50))
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((DRAWS, 1300), float("-inf"))
    logits[:, [3, 600, 1299]] = 0.0
    tokens, _ = sample(logits, rows(DRAWS, 1300), numbers(DRAWS))
    assert set(tokens.tolist()) == {3, 600, 1299}
