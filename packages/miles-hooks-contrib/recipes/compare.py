"""Run recipes over several seeds and draw their metrics with bands: `compare.py NAME`, needs nothing but Miles.

`compare/NAME.toml` says what is run and drawn:

    out = "../../../docs/contrib/dapo.svg"   # relative to this file, as recipes are
    seeds = [0, 1, 2]
    prepare = ["prepare_padded.py", "dr_grpo"] # a script of recipes and its words, run before; may be left out
    flags = ["--num-rollout", "60"]          # of every run; may be left out; {here} is the folder of recipes
    [runs.DAPO]                              # as the legend calls it
    recipe = "dapo.toml"
    flags = []                               # of this run; may be left out
    [[panels]]
    title = "reward"
    metric = "rollout/reward"                # of metrics.jsonl, training or evaluation
    x = "rollout/tokens"                     # summed up from rollout to rollout; without it, rollouts
    window = 5                               # mean of so many values; without it, 1

Lines are means over the seeds, bands reach from the least to the greatest. What is drawn is printed, too: the mean over
the second half of the x axis of each run, as mean and [least, greatest] of the seeds. A run that is there is not
repeated: delete `runs/compare/NAME` for that. `compare.py NAME --draw` runs nothing.
"""

import argparse
import json
import math
import subprocess
import sys
import tomllib
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 250, 44, 14, 48, 38
COLORS = ("#2563eb", "#d97706", "#16a34a", "#9333ea", "#64748b")
GRID, THOUSAND = 80, 1000

Points = list[tuple[float, float]]
Band = list[tuple[float, float, float, float]]
"""x, and the least, the mean and the greatest value over the seeds."""


def run(recipe: Path, flags: list[str], seed: int, folder: Path) -> None:
    """Train a recipe, unless the folder holds the finished run already."""
    finished = folder.with_name(f"{folder.name}.finished")
    if finished.exists():
        return
    words = ["train", str(recipe), "--seed", str(seed), "--rollout-seed", str(seed), "--run-dir", str(folder)]
    done = subprocess.run([sys.executable, "-m", "miles_api.cli", *words, "--overwrite", *flags], stdout=2, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe.name} with seed {seed} ended with code {done.returncode}: see {folder}")
    finished.touch()


def read_points(run_dir: Path, metric: str, x: str | None, window: int) -> Points:
    """Return (rollouts done, or the running sum of the metric `x`; value), each value a mean over a window."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    places: dict[int, float] = {0: 0.0}
    rollouts = [record for record in records if record["kind"] == "rollout"]
    steps = [1.0 if x is None else record["metrics"][x] for record in rollouts]
    places |= {r["rollout_id"] + 1: done for r, done in zip(rollouts, accumulate(steps), strict=True)}
    found = [(places[r["rollout_id"] + 1], r["metrics"][metric]) for r in records if metric in r["metrics"]]
    if not found:
        raise SystemExit(f"{run_dir} has no metric {metric}")
    return [
        (place, math.fsum(values) / len(values))
        for i, (place, _) in enumerate(found)
        for values in [[value for _, value in found[max(0, i + 1 - window) : i + 1]]]
    ]


def value_at(points: Points, x: float) -> float:
    """Return the value between two points, on the line through them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if x < points[0][0] else points[-1][1]


def band_of(runs: list[Points]) -> Band:
    """Return least, mean and greatest of several runs where all of them have points."""
    first, last = max(points[0][0] for points in runs), min(points[-1][0] for points in runs)
    places = [first + (last - first) * i / GRID for i in range(GRID + 1)]
    rows = [[value_at(points, x) for points in runs] for x in places]
    return [(x, min(row), math.fsum(row) / len(row), max(row)) for x, row in zip(places, rows, strict=True)]


def second_half(runs: list[Points]) -> list[float]:
    """Return each run's mean over the second half of its x axis."""
    halves = [[value for x, value in points if x > points[-1][0] / 2] for points in runs]
    return [math.fsum(half) / len(half) for half in halves]


def steps_to(top: float) -> list[float]:
    """Return round numbers from 0 to the first that is not below `top`."""
    if top <= 0:
        return [0.0]
    size = 10.0 ** math.floor(math.log10(top))
    step = next(size * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if top <= 5 * size * part)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def panel(title: str, x_name: str, bands: dict[str, Band], left: int) -> list[str]:
    """Return the SVG elements of one plot, its left edge at `left`."""
    x_ticks = steps_to(max(band[-1][0] for band in bands.values()))
    highest = max(high for band in bands.values() for _, _, _, high in band)
    lowest = min(0.0, *(low for band in bands.values() for _, low, _, _ in band))
    y_ticks = [-y for y in reversed(steps_to(-lowest)) if y] + steps_to(highest if highest > lowest else 1.0)
    x_end = max(band[-1][0] for band in bands.values())

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + LEFT + (WIDTH - LEFT - RIGHT) * x / x_end
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)

    parts = [f'<text x="{left + LEFT - 8}" y="18" font-weight="bold">{escape(title)}</text>']
    for tick in y_ticks:
        x, y = place(0, tick)
        parts.append(f'<path d="M{x} {y}h{WIDTH - LEFT - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end" fill="#555">{_short(tick)}</text>')
    for tick in (tick for tick in x_ticks if tick <= x_end):
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text x="{x}" y="{y + 15}" text-anchor="middle" fill="#555">{_short(tick)}</text>')
    middle = left + (WIDTH + LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle" fill="#555">{escape(x_name)}</text>')
    for color, band in zip(COLORS, bands.values(), strict=False):
        edge = [place(x, high) for x, _, _, high in band] + [place(x, low) for x, low, _, _ in reversed(band)]
        parts.append(f'<polygon points="{_path(edge)}" fill="{color}" fill-opacity="0.18"/>')
        line = _path([place(x, mean) for x, _, mean, _ in band])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    return parts


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _short(number: float) -> str:
    return f"{number / THOUSAND:g}k" if number >= 10 * THOUSAND else f"{number:g}"


def draw(panels: list[tuple[str, str, dict[str, Band]]]) -> str:
    """Return the SVG of plots side by side, with one legend; each plot is its title, its x axis' name and its bands."""
    names = zip(panels[0][2], COLORS, strict=False)
    legend = "".join(f'<tspan dx="16" fill="{color}">— {escape(name)}</tspan>' for name, color in names)
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT - 24}" y="36">{legend}</text>',
    ]
    for number, (title, x_name, bands) in enumerate(panels):
        parts += panel(title, x_name, bands, WIDTH * number)
    return "\n".join([*parts, "</svg>", ""])


def compare(name: str, *, only_draw: bool) -> None:
    """Run what `compare/NAME.toml` says, draw it, and print the numbers."""
    spec = tomllib.loads((HERE / "compare" / f"{name}.toml").read_text())
    folder = HERE / "runs" / "compare" / name
    folder.mkdir(parents=True, exist_ok=True)
    if "prepare" in spec and not only_draw:
        script, *words = spec["prepare"]
        subprocess.run([sys.executable, str(HERE / script), *words], stdout=2, check=True)
    for seed in spec["seeds"] if not only_draw else []:
        for title, one in spec["runs"].items():
            flags = [flag.replace("{here}", str(HERE)) for flag in (*spec.get("flags", []), *one.get("flags", []))]
            run(HERE / one["recipe"], flags, seed, folder / f"{title}-{seed}")
    panels = []
    for part in spec["panels"]:
        metric, x, window = part["metric"], part.get("x"), part.get("window", 1)
        bands = {}
        for title in spec["runs"]:
            runs = [read_points(folder / f"{title}-{seed}", metric, x, window) for seed in spec["seeds"]]
            bands[title], late = band_of(runs), second_half(runs)
            mean = math.fsum(late) / len(late)
            print(f"{part['title']}: {title} {mean:.4g} [{min(late):.4g}, {max(late):.4g}]")
        panels.append((part["title"], part.get("x_name", x or "rollouts"), bands))
    (HERE / spec["out"]).resolve().write_text(draw(panels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of compare/NAME.toml")
    parser.add_argument("--draw", action="store_true", help="only draw the runs that are there")
    given = parser.parse_args()
    compare(given.name, only_draw=given.draw)
