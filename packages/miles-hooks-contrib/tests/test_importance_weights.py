"""IcePop, sequence-level and truncated weights, and the options that fit none of them."""

import math

import pytest

torch = pytest.importorskip("torch")

from miles_api.loading.load import import_reference  # noqa: E402
from miles_api.testing import hook_args  # noqa: E402
from miles_hooks_contrib.icepop import IcepopOptions  # noqa: E402
from miles_hooks_contrib.seq_mis import SeqMisOptions  # noqa: E402

# Ratios of tokens: 0.4, 0.5, 5 and, masked, anything; 6 and 0.5. Of responses: 1 and 3.
RATIOS = [[0.4, 0.5, 5.0, math.nan], [6.0, 0.5], []]
MASKS = [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0], []]
KEPT = [True, True, True, False, True, True]


def call(name, **options):
    """Return the loss of tokens whose uncorrected loss is 1, the masks and the metrics."""
    hook = import_reference(name, short_names="miles.hooks.importance_weights", flag="--custom-tis-function-path")
    loss = torch.ones(6, requires_grad=True)
    columns = {
        "train_log_probs": [torch.tensor(ratios).log() - 1 for ratios in RATIOS],
        "rollout_log_probs": [torch.full((len(ratios),), -1.0) for ratios in RATIOS],
        "loss_masks": [torch.tensor(mask) for mask in MASKS],
    }
    found, masks, metrics = hook(hook_args(hook, **options), pg_loss=loss * 1, **columns)
    assert found.requires_grad
    assert torch.isfinite(torch.cat([found, *masks, *metrics.values()])).all()
    assert all(values.shape == (6,) and not values.requires_grad for values in metrics.values())
    return found[KEPT].tolist(), torch.cat(masks).tolist(), metrics


def test_icepop_keeps_ratios_within_its_range_and_masks_the_rest():
    weights, masks, metrics = call("icepop")
    assert weights == pytest.approx([0.4, 0.5, 5.0, 6.0, 0.5], rel=1e-5)
    assert masks == [0, 1, 1, 0, 0, 1]
    assert (metrics["icepop_low"].tolist(), metrics["icepop_high"].tolist()) == ([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0])
    assert call("icepop", icepop_alpha=0.0, icepop_beta=6.5)[1] == [1, 1, 1, 0, 1, 1]


def test_a_response_is_weighted_by_the_product_of_its_ratios_or_leaves_as_a_whole():
    weights, masks, metrics = call("seq_mis")
    assert weights == pytest.approx([1, 1, 1, 3, 3], rel=1e-5)
    assert masks == [1, 1, 1, 0, 0, 0]
    assert metrics["seq_mis_high"].tolist() == [0, 0, 0, 0, 1, 1]
    assert call("seq_mis", seq_mis_upper_bound=3.5, seq_mis_lower_bound=1.5)[1] == [0, 0, 0, 0, 1, 1]


def test_the_ratio_of_a_response_may_be_the_geometric_mean_as_in_gspo():
    weights, masks, _ = call("seq_mis", seq_mis_level="geometric", seq_mis_upper_bound=1.7)
    assert weights == pytest.approx([1, 1, 1, math.sqrt(3), math.sqrt(3)], rel=1e-5)
    assert masks == [1, 1, 1, 0, 0, 0]


def test_truncated_weights_keep_every_token_between_the_two_clips():
    weights, masks, metrics = call("tis", tis_clip=2.0, tis_clip_low=0.45)
    assert weights == pytest.approx([0.45, 0.5, 2.0, 2.0, 0.5], rel=1e-5)
    assert masks == [1, 1, 1, 0, 1, 1]
    assert metrics["tis_clipfrac"][KEPT].tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        (IcepopOptions, {"icepop_alpha": 2.0, "icepop_beta": 1.0}),
        (SeqMisOptions, {"seq_mis_lower_bound": 2.0}),
    ],
)
def test_a_range_that_keeps_nothing_is_refused(options, bounds):
    with pytest.raises(ValueError, match=r"2 is not below --.* [12]"):
        options(**bounds)
