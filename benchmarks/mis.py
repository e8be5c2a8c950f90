"""Masked importance sampling over a batch at once against the same method one sequence at a time, in torch.

    python benchmarks/mis.py [--repeat N]

Prints for each batch the milliseconds of both, their ratio, and by how much their weights differ at most. The form for
each sequence is the plain one: masked sums, clamps and comparisons on one sequence's tensors, and the same metrics.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch

from miles_hooks_contrib.mis import MisOptions, compute_mis_weights

BATCHES = {"32 × 16": (32, 16), "256 × 8": (256, 8), "256 × 256": (256, 256), "32 × 8192": (32, 8192)}
OPTIONS = {
    "tokens, truncate": {},
    "sequences, mask, rejection, veto": {
        "tis_mode": "mask", "tis_level": "sequence", "use_rs": True, "rs_level": "geometric", "rs_veto_threshold": 1e-4,
        "tis_batch_normalize": True,
    },
}  # fmt: skip
BOUND, KEPT = 20.0, 0.9


def make_batch(count: int, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return train and rollout log-probs and masks of sequences of half to the whole of a length."""
    torch.manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (count,)).tolist()
    rollout = [-torch.rand(n) * 3 for n in lengths]
    return (
        [one + 0.02 * torch.randn(len(one)) for one in rollout],
        rollout,
        [torch.cat((torch.ones(1), (torch.rand(n - 1) < KEPT).float())) for n in lengths],
    )


def by_sequence(args, train_log_probs, rollout_log_probs, loss_masks):
    """Do the same for each sequence by itself."""
    low = args.tis_lower_bound or 1.0 / args.tis_upper_bound
    found, weights, masks = {}, [], []

    def note(name: str, values: torch.Tensor, like: torch.Tensor) -> None:
        found.setdefault(name, []).append(values.expand_as(like).clone())

    for train, rollout, mask in zip(train_log_probs, rollout_log_probs, loss_masks, strict=True):
        count, gap = mask.sum().clamp_min(1), train - rollout
        whole, mean = (gap * mask).sum(), (gap * mask).sum() / count
        log_ppl, log_ppl_rollout = -(train * mask).sum() / count, -(rollout * mask).sum() / count
        ratio, product = gap.clamp(-BOUND, BOUND).exp(), whole.clamp(-BOUND, BOUND).exp()
        metrics = {
            "kl": -gap, "k3_kl": gap.exp() - gap - 1, "training_log_ppl": log_ppl, "training_ppl": log_ppl.exp(),
            "rollout_log_ppl": log_ppl_rollout, "rollout_ppl": log_ppl_rollout.exp(),
            "log_ppl_diff": log_ppl - log_ppl_rollout, "log_ppl_abs_diff": (log_ppl - log_ppl_rollout).abs(),
            "ppl_ratio": (log_ppl - log_ppl_rollout).exp(), "chi2_token": (ratio.square() * mask).sum() / count - 1,
            "chi2_seq": product.square() - 1,
            "ess": (ratio * mask).sum().square() / (count * (ratio.square() * mask).sum()).clamp_min(1e-30),
        }  # fmt: skip
        for name, values in metrics.items():
            note(name, values, gap)
        levels = {"token": gap, "sequence": whole.expand_as(gap), "geometric": mean.expand_as(gap)}
        w, m = levels[args.tis_level].clamp(-BOUND, BOUND).exp(), mask.clone()
        note("tis_weight_before_bound", w, gap)
        if args.tis_mode == "mask":
            m = m * ((w >= low) & (w <= args.tis_upper_bound))
            note("tis_mask_fraction_low", (w < low).float(), gap)
            note("tis_mask_fraction_high", (w > args.tis_upper_bound).float(), gap)
        else:
            note("tis_truncate_fraction", (w > args.tis_upper_bound).float(), gap)
            w = w.clamp(max=args.tis_upper_bound)
        w = w * mask
        note("tis_weight_after_bound", w, gap)
        if args.use_rs:
            judged = levels[args.rs_level].clamp(-BOUND, BOUND).exp()
            note("rs_mask_fraction_low", (judged < low).float(), gap)
            note("rs_mask_fraction_high", (judged > args.tis_upper_bound).float(), gap)
            m = m * ((judged >= low) & (judged <= args.tis_upper_bound))
            fatal = (gap < torch.tensor(args.rs_veto_threshold).log()) & (mask != 0)
            note("rs_catastrophic_token_fraction", fatal.float(), gap)
            note("rs_catastrophic_seq_fraction", fatal.any().float(), gap)
            m = m * (~fatal.any()).float()
        weights.append(w)
        masks.append(m)
    if args.tis_batch_normalize:
        means = [(w * m).sum() / m.sum().clamp_min(1) for w, m in zip(weights, loss_masks, strict=True)]
        factor = torch.stack(means).mean()
        weights = [w / factor for w in weights]
    for w, mask in zip(weights, loss_masks, strict=True):
        note("is_ratio_mean_final", (w * mask).sum() / mask.sum().clamp_min(1), w)
        note("is_ratio_min_final", w[mask.bool()].min(), w)
        note("is_ratio_max_final", w[mask.bool()].max(), w)
    return weights, masks, found


def least_ms(work, repeat: int) -> float:
    """Return the least milliseconds of so many calls."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    defaults = {name: getattr(MisOptions(), name) for name in MisOptions.__struct_fields__}
    print(
        "| sequences × tokens | options | ms, whole batch | ms, by sequence | ratio | most apart |"
        "\n|---|---|---|---|---|---|"
    )
    for batch_name, (count, length) in BATCHES.items():
        train, rollout, masks = make_batch(count, length)
        for name, changed in OPTIONS.items():
            args = SimpleNamespace(use_tis=True, **{**defaults, **changed})
            given = {"train_log_probs": train, "rollout_log_probs": rollout, "loss_masks": masks}
            ours, theirs = compute_mis_weights(args, **given), by_sequence(args, **given)
            apart = max(
                float((torch.cat(a) - torch.cat(b)).abs().max()) for a, b in zip(ours[:2], theirs[:2], strict=True)
            )
            whole = least_ms(lambda args=args, given=given: compute_mis_weights(args, **given), repeat)
            single = least_ms(lambda args=args, given=given: by_sequence(args, **given), repeat)
            print(f"| {batch_name} | {name} | {whole:.2f} | {single:.2f} | {single / whole:.1f} | {apart:.0e} |")


if __name__ == "__main__":
    main()
