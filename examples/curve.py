"""Draw a run's reward curve as a small SVG: `python examples/curve.py RUN_DIR OUT.svg`. Needs nothing but Python."""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 44, 16, 34, 40
TRAIN, HELD_OUT = "#2563eb", "#d97706"


def read_points(run_dir: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return (rollouts done, reward) of training and of the held-out prompts."""
    train, held_out = [], []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        done = record["rollout_id"] + 1
        for name, value in record["metrics"].items():
            if name == "rollout/reward":
                train.append((done, value))
            elif name.startswith("eval/") and name.endswith("/reward"):
                held_out.append((done, value))
    return train, held_out


def draw(train: list[tuple[int, float]], held_out: list[tuple[int, float]]) -> str:
    """Return the SVG: training as a line, held-out as dots with their values."""
    last = max(done for done, _ in [*train, *held_out])

    def place(done: int, reward: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * done / last
        return round(x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - reward), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20"><tspan fill="{TRAIN}">— training reward</tspan>'
        f'<tspan dx="18" fill="{HELD_OUT}">● held-out, greedy</tspan></text>',
    ]
    for tenths in range(0, 11, 2):
        _, y = place(0, tenths / 10)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#555">{tenths / 10:g}</text>')
    for done in range(0, last + 1, max(1, last // 5)):
        x, _ = place(done, 0)
        parts.append(f'<text x="{x}" y="{HEIGHT - 22}" text-anchor="middle" fill="#555">{done}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle" fill="#555">rollouts</text>')
    line = " ".join("{},{}".format(*place(*point)) for point in train)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{TRAIN}" stroke-width="2"/>')
    for done, reward in held_out:
        x, y = place(done, reward)
        side = "start" if done == 0 else "end" if done == last else "middle"
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{HELD_OUT}"/>')
        parts.append(f'<text x="{x}" y="{y - 8}" text-anchor="{side}" fill="{HELD_OUT}">{reward:.2f}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(*read_points(Path(sys.argv[1]))))
