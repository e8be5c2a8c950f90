"""recipes/compare.py: what it draws is what the runs logged; and every comparison names recipes that are there."""

import importlib.util
import json
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
SPECS = sorted((RECIPES / "compare").glob("*.toml"))


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_recipes", RECIPES / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder, rewards, tokens=10.0):
    folder.mkdir(parents=True)
    rows = [{"kind": "eval", "rollout_id": -1, "metrics": {"eval/x/reward": 0.0}}]
    for number, reward in enumerate(rewards):
        metrics = {"rollout/reward": reward, "rollout/tokens": tokens}
        rows.append({"kind": "rollout", "rollout_id": number, "metrics": metrics})
    rows.append({"kind": "eval", "rollout_id": len(rewards) - 1, "metrics": {"eval/x/reward": 1.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_points_are_placed_at_rollouts_done_or_at_tokens_spent(compare, tmp_path):
    run = write_run(tmp_path / "run", [0.0, 0.5, 1.0])
    assert compare.read_points(run, "rollout/reward", None, 1) == [(1.0, 0.0), (2.0, 0.5), (3.0, 1.0)]
    assert compare.read_points(run, "rollout/reward", "rollout/tokens", 2) == [(10.0, 0.0), (20.0, 0.25), (30.0, 0.75)]
    assert compare.read_points(run, "eval/x/reward", "rollout/tokens", 1) == [(0.0, 0.0), (30.0, 1.0)]


def test_a_metric_that_no_run_has_is_named(compare, tmp_path):
    with pytest.raises(SystemExit, match="has no metric rollout/rewart"):
        compare.read_points(write_run(tmp_path / "run", [0.0]), "rollout/rewart", None, 1)


def test_a_band_is_mean_least_and_greatest_where_all_seeds_have_values(compare):
    band = compare.band_of([[(0.0, 0.0), (4.0, 4.0)], [(0.0, 2.0), (2.0, 4.0), (8.0, 4.0)]])
    assert band[0] == (0.0, 0.0, 1.0, 2.0)
    assert band[len(band) // 2] == pytest.approx((2.0, 2.0, 3.0, 4.0))
    assert band[-1] == (4.0, 4.0, 4.0, 4.0)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.1, 0.9], [-3.0, 0.5], [120.0, 90_000.0]])
def test_everything_is_drawn_inside_the_picture(compare, values):
    band = compare.band_of([list(enumerate(values, 1)), list(enumerate(reversed(values), 1))])
    svg = ET.fromstring(compare.draw([("a < b", "rollouts", {"one": band, "two & three": band})] * 2))
    places = [
        tuple(map(float, place.split(",")))
        for shape in svg.iter()
        if "points" in shape.attrib
        for place in shape.get("points").split()
    ]
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert len([shape for shape in svg.iter() if shape.tag.endswith("polyline")]) == 4
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_a_comparison_names_recipes_that_are_there_and_draws_into_the_docs(spec):
    read = tomllib.loads(spec.read_text())
    assert len(read["seeds"]) == 3
    assert all((RECIPES / run["recipe"]).is_file() for run in read["runs"].values())
    assert (RECIPES / read.get("prepare", ["compare.py"])[0]).is_file()
    assert (RECIPES / read["out"]).resolve().parent == (RECIPES / "../../../docs/contrib").resolve()
    assert all(panel["title"] and panel["metric"] for panel in read["panels"])


def test_a_run_that_is_there_is_not_repeated_and_every_seed_is_run(compare, monkeypatch, tmp_path):
    trained = []

    def train(words, **_):
        trained.append(words[words.index("--run-dir") + 1])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare.subprocess, "run", train)
    for _ in range(2):
        for seed in range(2):
            compare.run(RECIPES / "dapo.toml", [], seed, tmp_path / f"v1.0-{seed}")
    assert trained == [str(tmp_path / "v1.0-0"), str(tmp_path / "v1.0-1")]


def test_what_a_comparison_needs_is_made_before_its_first_run_and_not_to_draw_again(compare, monkeypatch, tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "x.toml").write_text(
        'out = "x.svg"\nseeds = [0]\nprepare = ["make.py", "data"]\n[runs.one]\nrecipe = "one.toml"\n'
        '[[panels]]\ntitle = "reward"\nmetric = "rollout/reward"\n'
    )
    started = []

    def start(words, **_):
        started.append(words[1:])
        if "train" in words:
            write_run(Path(words[words.index("--run-dir") + 1]), [0.0, 1.0])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setattr(compare.subprocess, "run", start)
    compare.compare("x", only_draw=False)
    assert started[0] == [str(tmp_path / "make.py"), "data"]
    assert [words[2:4] for words in started[1:]] == [["train", str(tmp_path / "one.toml")]]
    compare.compare("x", only_draw=True)
    assert len(started) == 2
    assert (tmp_path / "x.svg").read_text().startswith("<svg")


def test_a_run_that_fails_ends_the_comparison_and_is_run_again(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(compare.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 3))
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"dapo.toml with seed 0 ended with code 3"):
            compare.run(RECIPES / "dapo.toml", [], 0, tmp_path / "run")
