"""Masked importance sampling against a reference written out one sequence at a time, and against vectors by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from miles_hooks_contrib.mis import MisOptions, compute_mis_weights, mis  # noqa: E402

DEFAULTS = {name: getattr(MisOptions(), name) for name in MisOptions.__struct_fields__}
MODES = ("truncate", "clip", "mask")
LEVELS = ("token", "sequence", "geometric")
REJECTIONS = {
    "none": {},
    "token": {"use_rs": True, "rs_level": "token"},
    "sequence": {"use_rs": True, "rs_level": "sequence", "rs_lower_bound": 0.2, "rs_upper_bound": 6.0},
    "geometric": {"use_rs": True, "rs_level": "geometric", "rs_lower_bound": 0.8, "rs_upper_bound": 1.15},
    "veto": {"use_rs": True, "rs_level": "geometric", "rs_veto_threshold": 0.02},
}


def options(**changed):
    return SimpleNamespace(use_tis=True, **{**DEFAULTS, **changed})


def compute(args, batch):
    train, rollout, masks = batch
    return compute_mis_weights(args, train_log_probs=train, rollout_log_probs=rollout, loss_masks=masks)


def tensors(*columns):
    return [[torch.tensor(values, dtype=torch.float32) for values in column] for column in columns]


def random_batch(seed, count=24, spread=0.6):
    make = torch.Generator().manual_seed(seed)
    lengths = [0, 1, *torch.randint(1, 40, (count - 2,), generator=make).tolist()]
    rollout = [-torch.rand(n, generator=make) * 3 for n in lengths]
    gaps = [torch.randn(n, generator=make) * spread for n in lengths]
    gaps[3][0], gaps[4][:1], gaps[5][-1] = -6.0, 31.0, -45.0
    masks = [(torch.rand(n, generator=make) > 0.2).float() for n in lengths]
    masks[3][0] = masks[5][-1] = 1.0
    masks[6].zero_()
    return [one + gap for one, gap in zip(rollout, gaps, strict=True)], rollout, masks


def reference(o, batch):
    """The method in words: a ratio for each token, bounds, rejection, veto, then division by the batch's mean."""
    low = o.tis_lower_bound if o.tis_lower_bound is not None else 1 / o.tis_upper_bound
    rs_low = o.rs_lower_bound if o.rs_lower_bound is not None else low
    rs_high = o.rs_upper_bound if o.rs_upper_bound is not None else o.tis_upper_bound
    weights, masks = [], []

    def ratio(level, gaps, mask, token):
        kept = [gap for gap, m in zip(gaps, mask, strict=True) if m]
        exponent = {
            "token": lambda: gaps[token],
            "sequence": lambda: math.fsum(kept),
            "geometric": lambda: math.fsum(kept) / max(len(kept), 1),
        }[level]()
        return math.exp(max(-20.0, min(20.0, exponent)))

    for train, rollout, mask in zip(*(tuple(t.double().tolist() for t in column) for column in batch), strict=True):
        gaps = [p - q for p, q in zip(train, rollout, strict=True)]
        threshold = math.log(o.rs_veto_threshold) if o.use_rs and o.rs_veto_threshold is not None else -math.inf
        vetoed = any(m and gap < threshold for gap, m in zip(gaps, mask, strict=True))
        own_weights, own_mask = [], []
        for token, m in enumerate(mask):
            w = ratio(o.tis_level, gaps, mask, token)
            stays = bool(m) and not vetoed
            if o.tis_mode == "mask":
                stays &= low <= w <= o.tis_upper_bound
            if o.use_rs:
                stays &= rs_low <= ratio(o.rs_level, gaps, mask, token) <= rs_high
            bounded = {"truncate": min(w, o.tis_upper_bound), "clip": min(max(w, low), o.tis_upper_bound), "mask": w}
            own_weights.append(bounded[o.tis_mode] * m)
            own_mask.append(float(stays))
        weights.append(own_weights)
        masks.append(own_mask)
    if o.tis_batch_normalize:
        given = [mask.tolist() for mask in batch[2]]
        if o.tis_level == "token":
            mean = math.fsum(map(sum, weights)) / max(sum(map(sum, given)), 1)
        else:
            mean = math.fsum(sum(w) / max(sum(m), 1) for w, m in zip(weights, given, strict=True)) / len(weights)
        weights = [[w / mean for w in own] for own in weights]
    return weights, masks


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.tensor(other, dtype=torch.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("mode", "level", "rejection"), itertools.product(MODES, LEVELS, REJECTIONS))
def test_weights_and_masks_are_those_of_the_method_written_out(mode, level, rejection, normalize):
    args = options(tis_mode=mode, tis_level=level, tis_batch_normalize=normalize, **REJECTIONS[rejection])
    for seed in range(3):
        batch = random_batch(seed, spread=(0.05, 0.3, 0.9)[seed])
        weights, masks, _ = compute(args, batch)
        expected_weights, expected_masks = reference(args, batch)
        assert_close(weights, expected_weights)
        assert_close(masks, expected_masks)


LN2, LN3 = math.log(2), math.log(3)
# Ratios of tokens: 2, 1/2, 3 (masked: its engine's log-prob is anything) and 3, 3; of responses: 1 and 9; their
# geometric means: 1 and 3.
TWO_RESPONSES = tensors(
    [[-1.0, -1.0 - LN2, -1.0], [-1.0, -2.0]], [[-1.0 - LN2, -1.0, -1.0 - LN3], [-1.0 - LN3, -2.0 - LN3]],
    [[1, 1, 0], [1, 1]],
)  # fmt: skip
BY_HAND = {
    "token truncate": ({}, [[2, 0.5, 0], [2, 2]], [[1, 1, 0], [1, 1]]),
    "token clip": ({"tis_mode": "clip", "tis_upper_bound": 1.25}, [[1.25, 0.8, 0], [1.25, 1.25]], [[1, 1, 0], [1, 1]]),
    "token mask keeps the ratio of what it masks": (
        {"tis_mode": "mask", "tis_upper_bound": 2.5}, [[2, 0.5, 0], [3, 3]], [[1, 1, 0], [0, 0]],
    ),
    "sequence truncate": ({"tis_level": "sequence"}, [[1, 1, 0], [2, 2]], [[1, 1, 0], [1, 1]]),
    "sequence mask": ({"tis_level": "sequence", "tis_mode": "mask"}, [[1, 1, 0], [9, 9]], [[1, 1, 0], [0, 0]]),
    "geometric mask": (
        {"tis_level": "geometric", "tis_mode": "mask", "tis_upper_bound": 4.0},
        [[1, 1, 0], [3, 3]], [[1, 1, 0], [1, 1]],
    ),
    "rejection takes the bounds of the weights": (
        {"use_rs": True, "tis_upper_bound": 1.5}, [[1.5, 0.5, 0], [1.5, 1.5]], [[0, 0, 0], [0, 0]],
    ),
    "rejection judges unbounded ratios": (
        {"use_rs": True, "rs_level": "geometric", "rs_upper_bound": 2.9}, [[2, 0.5, 0], [2, 2]], [[1, 1, 0], [0, 0]],
    ),
    "a veto takes the whole response": (
        {"use_rs": True, "rs_level": "sequence", "rs_upper_bound": 10.0, "rs_veto_threshold": 0.6},
        [[2, 0.5, 0], [2, 2]], [[0, 0, 0], [1, 1]],
    ),
    "token normalisation": ({"tis_batch_normalize": True}, [[2 / 1.625, 0.5 / 1.625, 0], [2 / 1.625] * 2],
                            [[1, 1, 0], [1, 1]]),
    "sequence normalisation": (
        {"tis_batch_normalize": True, "tis_level": "sequence", "tis_upper_bound": 4.0},
        [[0.4, 0.4, 0], [1.6, 1.6]], [[1, 1, 0], [1, 1]],
    ),
    "normalisation counts what is rejected": (
        {"tis_batch_normalize": True, "tis_level": "sequence", "tis_mode": "mask"},
        [[0.2, 0.2, 0], [1.8, 1.8]], [[1, 1, 0], [0, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_vectors_by_hand(case):
    changed, expected_weights, expected_masks = BY_HAND[case]
    weights, masks, _ = compute(options(**changed), TWO_RESPONSES)
    assert_close(weights, expected_weights)
    assert_close(masks, expected_masks)


def test_log_ratios_are_kept_within_twenty_nats():
    batch = tensors([[0.0, -50.0]], [[-50.0, 0.0]], [[1, 1]])
    args = options(tis_mode="mask", tis_lower_bound=0.0, tis_upper_bound=1e30)
    [weights], [masks], _ = compute(args, batch)
    torch.testing.assert_close(weights, torch.tensor([math.exp(20), math.exp(-20)]))
    assert masks.tolist() == [1, 1]


def test_the_metrics_are_the_formulas_over_the_unmasked_tokens_of_a_response():
    _, _, metrics = compute(options(), TWO_RESPONSES)
    p, q = [-1.0, -1.0 - LN2], [-1.0 - LN2, -1.0]
    expected = {
        "kl": [-LN2, LN2], "k3_kl": [1 - LN2, LN2 - 0.5], "training_log_ppl": -sum(p) / 2,
        "training_ppl": math.exp(-sum(p) / 2), "rollout_ppl": math.exp(-sum(q) / 2), "log_ppl_diff": 0.0,
        "ppl_ratio": 1.0, "chi2_token": (4 + 0.25) / 2 - 1, "chi2_seq": 0.0, "ess": 2.5**2 / (2 * 4.25),
        "ess_seq": 10**2 / (2 * 82), "is_ratio_max_final": 2.0, "is_ratio_min_final": 0.5, "tis_truncate_fraction": 0.0,
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name][0][:2], torch.tensor(value).expand(2), msg=name)
    second = {"chi2_seq": 80.0, "ppl_ratio": 1 / 3, "log_ppl_abs_diff": LN3, "tis_truncate_fraction": 1.0}
    for name, value in second.items():
        torch.testing.assert_close(metrics[name][1], torch.full((2,), value), msg=name)
    assert all([len(part) for part in parts] == [3, 2] for parts in metrics.values())


def test_without_use_tis_nothing_but_metrics_is_computed():
    weights, masks, metrics = compute(SimpleNamespace(use_tis=False), TWO_RESPONSES)
    assert weights is None
    assert masks is TWO_RESPONSES[2]
    assert {"kl", "k3_kl", "ppl_ratio", "chi2_seq", "ess"} <= metrics.keys()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("anything", [math.nan, math.inf, -1e9])
def test_masked_tokens_may_hold_anything_and_everything_stays_finite(level, anything):
    train, rollout, masks = random_batch(1)
    broken = [torch.where(mask != 0, values, anything) for values, mask in zip(rollout, masks, strict=True)]
    args = options(tis_level=level, use_rs=True, rs_level=level, rs_veto_threshold=1e-4, tis_batch_normalize=True)
    expected, found = compute(args, (train, rollout, masks)), compute(args, (train, broken, masks))
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(torch.cat(one), torch.cat(other))
    assert all(torch.cat(parts).isfinite().all() for parts in found[2].values())


def test_a_gap_beyond_what_fp32_can_exponentiate_gives_finite_metrics():
    batch = tensors([[-300.0], [-1.0]], [[-0.1], [-300.0]], [[1], [1]])
    weights, _, metrics = compute(options(tis_mode="mask"), batch)
    assert torch.cat([*weights, *itertools.chain(*metrics.values())]).isfinite().all()


def test_the_hook_multiplies_the_loss_and_hands_back_the_masks():
    train, rollout, masks = TWO_RESPONSES
    leaf = torch.ones(5, requires_grad=True)
    args = options(tis_mode="mask", tis_level="sequence")
    loss, kept, metrics = mis(
        args, pg_loss=leaf * 2, train_log_probs=train, rollout_log_probs=rollout, loss_masks=masks
    )
    assert loss.tolist() == pytest.approx([2, 2, 0, 18, 18], rel=1e-5)
    assert [mask.tolist() for mask in kept] == [[1, 1, 0], [0, 0]]
    loss.sum().backward()
    assert leaf.grad.tolist() == pytest.approx([2, 2, 0, 18, 18], rel=1e-5)
    assert metrics["mis_kept_fraction"].tolist() == [1, 1, 0, 0, 0]
    assert not any(values.requires_grad for values in metrics.values())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tis_mode": "clip", "tis_upper_bound": 0.9}, "--tis-lower-bound 1.11111 is not below --tis-upper-bound 0.9"),
        ({"use_rs": True, "rs_upper_bound": 0.4}, "rejection keeps nothing: its lower bound 0.5"),
        ({"rs_veto_threshold": 1e-4}, "--rs-veto-threshold has no effect without --use-rs"),
        ({"rs_upper_bound": 3.0}, "--rs-upper-bound has no effect without --use-rs"),
    ],
)
def test_bounds_that_cannot_work_are_refused_when_options_are_read(changed, said):
    with pytest.raises(ValueError, match=said):
        MisOptions(**changed)


def test_lists_that_do_not_fit_are_refused_naming_the_response():
    train, rollout, masks = TWO_RESPONSES
    with pytest.raises(ValueError, match="response 1 has shapes"):
        compute(options(), (train, [rollout[0], rollout[1][:1]], masks))
    with pytest.raises(ValueError, match="1, 2 and 2 responses"):
        compute(options(), (train[:1], rollout, masks))
