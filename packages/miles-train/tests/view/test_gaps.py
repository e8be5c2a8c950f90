"""The report's page on tokens that trainer and engines disagree about."""

from __future__ import annotations

import json
import re

import pytest

from miles_train.token_gap_types import NUM_BINS
from miles_train.view.gaps import MOST_ROWS, gap_page
from miles_train.view.report import write_report
from miles_train.view.run_directory import read_run
from miles_train.view.token_text import TokenText

HEALTHY, BROKEN = 9, 29
"""Bins of gaps around 1e-6 and 0.1."""


def source(engine, version, tokens, place=HEALTHY, gap=1e-6):
    bins = [0] * NUM_BINS
    bins[place] = tokens
    sums = {"tokens": tokens, "gap": gap * tokens, "log_ratio": -gap * tokens, "largest": 2 * gap}
    return {"engine": engine, "version": version, **sums, "bins": bins}


def token(gap, tokens, at, **changed):
    about = {"trainer": -gap, "rollout": 0.0, "sample": 3, "position": 1, "engine": "b:2", "version": "1"}
    return {"gap": gap, "tokens": tokens, "at": at, **about, **changed}


def line(rollout_id, sources, worst=()):
    scale = {"lowest_decade": -8, "bins_per_decade": 4}
    return {"kind": "rollout", "rollout_id": rollout_id, **scale, "sources": sources, "worst": list(worst)}


@pytest.fixture
def run_with_gaps(make_run):
    def make(*lines, config=""):
        rollouts = [{"kind": "rollout", "rollout_id": i, "metrics": {}, "seconds": {}} for i in range(len(lines))]
        run = make_run(rollouts, config=config, summary={"status": "finished"})
        (run / "mismatch.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        return run

    return make


def page_of(run):
    return gap_page(read_run(run))


def test_a_planted_mismatch_of_one_engine_shows_under_that_engine(run_with_gaps):
    run = run_with_gaps(*(
        line(i, [source("a:1", str(i), 90), source("b:2", str(i), 30, BROKEN, 0.1)], [token(0.2, [5, 6, 7], 1)])
        for i in range(3)
    ))  # fmt: skip
    everything, engines, _ = page_of(run).tables
    [whole] = everything.rows
    assert (whole.tokens, whole.alarming) == ("360", "25.0 %")
    broken, healthy = engines.rows
    assert (broken.name, broken.tokens, broken.mean, broken.bias, broken.alarming) == (
        "b:2",
        "90",
        "0.1",
        "-0.1",
        "100.0 %",
    )
    assert (healthy.name, healthy.tokens, healthy.alarming, healthy.bad) == ("a:1", "270", "0.0 %", False)
    text = write_report(run).read_text()
    assert "b:2" in text
    charts = json.loads(re.search(r'id="chart-data">(.*?)</script>', text)[1])["sections"]["gap"]
    [lines] = [chart["series"] for chart in charts if chart["title"] == "Mean gap, by engine"]
    assert {one["name"]: one["y"] for one in lines} == {"a:1": [1e-6] * 3, "b:2": [0.1] * 3}


def test_the_bars_of_a_histogram_hold_every_token(run_with_gaps):
    one = source("", "0", 5)
    one["bins"][0], one["bins"][-1], one["tokens"] = 2, 1, 8
    [row] = page_of(run_with_gaps(line(0, [one]))).tables[0].rows
    assert sum(int(title.split(": ")[1].split()[0]) for _, _, title in row.bars) == 8
    assert row.bars[0][2].startswith("below 1e-8")
    assert row.bars[-1][2].startswith("100 or more")


def test_of_many_versions_those_with_the_largest_gaps_are_shown_in_their_order(run_with_gaps):
    lines = [line(i, [source("a:1", str(i), 4, gap=(1 + i % 7) * 1e-6)]) for i in range(30)]
    _, versions = page_of(run_with_gaps(*lines)).tables
    assert [row.name for row in versions.rows] == sorted((row.name for row in versions.rows), key=int)
    assert {int(row.name) % 7 for row in versions.rows[:MOST_ROWS]} == {5, 6}
    assert versions.note == "22 more, with smaller mean gaps, are not shown."


def test_the_worst_tokens_of_all_rollouts_come_first_with_the_text_around_them(run_with_gaps, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<x>": 0, "the": 1, "cat": 2, "<b>sat</b>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<x>"))
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    sources = [source("b:2", "1", 9)]
    lines = [line(0, sources, [token(0.2, [1, 2, 3], 1)]), line(1, sources, [token(0.5, [1, 2, 3], 2, sample=8)])]
    run = run_with_gaps(*lines, config=f'[run]\nhf_checkpoint = "{tmp_path / "model"}"\n')
    first, second = page_of(run).worst
    assert (first.before, first.token, first.after) == ("the cat", " <b>sat</b>", "")
    assert (second.before, second.token, second.after) == ("the", " cat", " <b>sat</b>")
    assert (first.where, first.engine) == ("rollout 1, sample 8, token 2", "b:2")
    assert (first.rollout, first.trainer) == ("1", "0.607")
    assert "<mark> &lt;b&gt;sat&lt;/b&gt;</mark>" in write_report(run).read_text()


def text_around(tmp_path, tokens, at):
    return TokenText(f'[run]\nhf_checkpoint = "{tmp_path}"\n', tmp_path).around(tokens, at)


def test_a_token_that_cannot_be_seen_is_shown_by_signs_or_its_id(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "\n": 1, " ": 2, "b": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shown = [text_around(tmp_path, [0, token, 3], 1) for token in (1, 2, 99)]
    assert shown == [("a", "⏎", "b"), ("a", "␣", "b"), ("a", "[99]", "b")]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "9"}'])
def test_a_tokenizer_that_cannot_be_read_leaves_token_ids(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert text_around(tmp_path, [11, 22, 33], 1) == ("11", " 22", " 33")


def test_of_many_engines_those_that_stand_out_are_drawn_whenever_they_came(run_with_gaps):
    lines = [line(i, [source(f"a:{i}", "0", 9, gap=(1 + i) * 1e-6)]) for i in range(20)]
    text = write_report(run_with_gaps(*lines)).read_text()
    charts = json.loads(re.search(r'id="chart-data">(.*?)</script>', text)[1])["sections"]["gap"]
    [lines] = [chart["series"] for chart in charts if chart["title"] == "Mean gap, by engine"]
    assert [one["name"] for one in lines] == [f"a:{i}" for i in range(19, 11, -1)]


@pytest.mark.parametrize("changed", [
    {"sources": [source("b:2", "0", 3) | {"bins": [3]}]},
    {"sources": [source("b:2", "0", 0)]},
    {"sources": [source("b:2", "0", 3) | {"gap": None}]},
    {"bins_per_decade": 8},
])  # fmt: skip
def test_a_line_that_cannot_be_added_to_the_others_is_told_and_left_out(run_with_gaps, changed):
    run = run_with_gaps(line(0, [source("a:1", "0", 3)]), line(1, [source("a:1", "0", 3)]) | changed)
    write_report(run)
    found = read_run(run)
    assert [one.rollout_id for one in found.gaps] == [0]
    assert any("mismatch.jsonl: 1 line could not be read" in problem for problem in found.problems)


def test_without_the_tokenizer_token_ids_stand_for_text(run_with_gaps):
    run = run_with_gaps(line(0, [source("", "", 9)], [token(0.2, [11, 22, 33], 1)]), config="[run]\n")
    [worst] = page_of(run).worst
    assert (worst.before, worst.token, worst.after) == ("11", " 22", " 33")


def test_a_run_that_compared_nothing_has_no_such_page_and_a_broken_line_is_told(run_with_gaps):
    assert page_of(run_with_gaps()) is None
    run = run_with_gaps(line(0, [source("a:1", "0", 3)]))
    with (run / "mismatch.jsonl").open("a") as file:
        file.write('{"rollout_id": 1, "sour')
    found = read_run(run)
    assert [one.rollout_id for one in found.gaps] == [0]
    assert any("mismatch.jsonl: 1 line could not be read" in problem for problem in found.problems)
