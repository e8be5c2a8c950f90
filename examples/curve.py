"""Draw a run's reward curve as a small SVG: `python examples/curve.py RUN_DIR OUT.svg`. Needs nothing but Python.

Metrics named behind OUT.svg, such as `agents/solver`, are drawn in place of the training reward, each as a line.
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 44, 16, 34, 40
REWARD, NAMES = "rollout/reward", {"rollout/reward": "training reward"}
LINES, HELD_OUT = ("#2563eb", "#16a34a", "#9333ea", "#64748b"), "#d97706"

Points = list[tuple[int, float]]


def read_points(run_dir: Path, metrics: list[str]) -> tuple[dict[str, Points], Points]:
    """Return (rollouts done, value) of metrics in training, and of the reward on held-out prompts."""
    lines: dict[str, Points] = {name: [] for name in metrics}
    held_out: Points = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        done = record["rollout_id"] + 1
        for name, value in record["metrics"].items():
            if name in lines:
                lines[name].append((done, value))
            elif name.startswith("eval/") and name.endswith("/reward"):
                held_out.append((done, value))
    return lines, held_out


def draw(lines: dict[str, Points], held_out: Points) -> str:
    """Return the SVG: training as lines, held-out as dots with their values."""
    last = max(done for done, _ in [*held_out, *(point for points in lines.values() for point in points)])
    colors = dict(zip(lines, LINES, strict=False))
    words = [(colors[name], f"— {NAMES.get(name, name.rpartition('/')[2])}") for name in lines]
    words.append((HELD_OUT, "● held-out, greedy" if REWARD in lines else "● held-out"))
    legend = "".join(f'<tspan dx="18" fill="{color}">{word}</tspan>' for color, word in words)

    def place(done: int, reward: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * done / last
        return round(x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - reward), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT - 18}" y="20">{legend}</text>',
    ]
    for tenths in range(0, 11, 2):
        _, y = place(0, tenths / 10)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#555">{tenths / 10:g}</text>')
    for done in range(0, last + 1, max(1, last // 5)):
        x, _ = place(done, 0)
        parts.append(f'<text x="{x}" y="{HEIGHT - 22}" text-anchor="middle" fill="#555">{done}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle" fill="#555">rollouts</text>')
    for name, points in lines.items():
        line = " ".join("{},{}".format(*place(*point)) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colors[name]}" stroke-width="2"/>')
    for done, reward in held_out:
        x, y = place(done, reward)
        side = "start" if done == 0 else "end" if done == last else "middle"
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{HELD_OUT}"/>')
        parts.append(f'<text x="{x}" y="{y - 8}" text-anchor="{side}" fill="{HELD_OUT}">{reward:.2f}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(*read_points(Path(sys.argv[1]), sys.argv[3:] or [REWARD])))
