"""Math grading: `--rm-type math` (text and numbers first, then the process pool) against math-verify called directly.

    python benchmarks/rewards.py [--rounds 3]

Both grade the pairs of the test-suite, each in a response of some length. Rates are per second of processor time, all
processes together, so they hold on a busy machine; the wall clock is given beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from miles_api.config import RunConfig, option_groups
from miles_api.sample import Sample
from miles_rollout.options import RewardOptions
from miles_rollout.rewards import reward
from miles_rollout.rewards.math import quick_math
from miles_rollout.rewards.pool import GraderPool, close_pools, pool_of

if TYPE_CHECKING:
    from collections.abc import Callable

_PAIRS = Path(__file__).parents[1] / "packages/miles-rollout/tests/rewards/math_pairs.jsonl"
_RESPONSE = "We first note that $x>0$, so 3 cases remain. " * 20 + "\n\nTherefore the answer is $\\boxed{{{}}}$."
_GOLD, _ANSWER = (LatexExtractionConfig(),), (ExprExtractionConfig(), LatexExtractionConfig())

Pair = tuple[str, str]


def pairs() -> list[Pair]:
    """Return responses with their labels."""
    lines = [json.loads(line) for line in _PAIRS.read_text().splitlines()]
    return [(_RESPONSE.format(line["answer"]), line["label"]) for line in lines]


def directly(given: list[Pair]) -> list[float]:
    """Grade as its documentation shows, and as verl does: parse both, verify; no clocks."""
    scores = []
    for response, label in given:
        gold = parse(f"\\boxed{{{label}}}", _GOLD, parsing_timeout=0)
        answer = parse(response, _ANSWER, parsing_timeout=0)
        scores.append(float(verify(gold, answer, timeout_seconds=0)))
    return scores


def as_a_run_does(given: list[Pair], workers: int) -> list[float]:
    """Grade through the default reward hook, all samples at once."""
    groups = {name: kind() for name, kind in option_groups().items()}
    args = RunConfig(groups, {}).replace("benchmark", rm_type="math", rm_workers=workers).args

    async def everything() -> list[Any]:
        return await asyncio.gather(*(reward(args, Sample(response=r, label=label)) for r, label in given))

    return asyncio.run(everything())


def all_in_the_pool(given: list[Pair], pool: GraderPool) -> list[float]:
    """Grade every pair in grading processes, also those that text decides."""
    kind = "miles_rollout.rewards.math_verified:math_score"
    return [future.result() for future in [pool.submit(kind, r, label, {}) for r, label in given]]


def processor_seconds() -> float:
    """Return what this process and its children that have ended have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def of_living(pids: list[int]) -> float:
    """Return what living children have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(what: Callable[[], list[float]], workers: int, rounds: int) -> tuple[float, float, list[float]]:
    """Return processor and wall seconds of the best round, with the scores; each round has new processes."""
    best, scores = (float("inf"), float("inf")), []
    for _ in range(rounds):
        close_pools()
        pool = pool_of(RewardOptions(rm_workers=workers)) if workers else None
        if pool is not None:
            # Started, and with everything imported, on other answers.
            all_in_the_pool([(f"\\boxed{{\\sqrt{{{n}}}}}", "3\\pi") for n in range(4 * workers)], pool)
        pids = pool.pids() if pool is not None else []
        used, began = processor_seconds() + of_living(pids), time.perf_counter()
        scores = what()
        wall = time.perf_counter() - began
        best = min(best, (processor_seconds() + of_living(pids) - used, wall))
    return *best, scores


def main() -> None:
    """Print rates, shares and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    given = pairs()
    decided = [quick_math(response, label, {}) for response, label in given]
    share = sum(score is not None for score in decided) / len(given)
    print(f"{len(given)} pairs; text and numbers decide {share:.0%}")
    directly(given[:4])
    base, wall, wanted = timed(lambda: directly(given), 0, rounds)
    line("math-verify, directly, one process", len(given), base, wall, base)
    used, wall, _ = timed(lambda: [quick_math(r, label, {}) or 0.0 for r, label in given], 0, rounds)
    line("text and numbers alone", len(given), used, wall, base)
    rest = [pair for pair, score in zip(given, decided, strict=True) if score is None]
    hard, wall, _ = timed(lambda: directly(rest), 0, rounds)
    line("what they leave: directly", len(rest), hard, wall, hard)
    used, wall, _ = timed(lambda: all_in_the_pool(rest, pool_of(RewardOptions(rm_workers=1))), 1, rounds)
    line("what they leave: in the pool", len(rest), used, wall, hard)
    for workers in (1, 2):
        used, wall, found = timed(lambda workers=workers: as_a_run_does(given, workers), workers, rounds)
        line(f"--rm-type math, --rm-workers {workers}", len(given), used, wall, base)
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    print(f"same verdict as math-verify: {same / len(given):.1%}")
    close_pools()


def line(what: str, count: int, used: float, wall: float, base: float) -> None:
    """Print one row."""
    print(f"{what:40s} {count / used:8.0f} /s of processor  {base / used:6.2f}x   {count / wall:8.0f} /s on the clock")


if __name__ == "__main__":
    main()
