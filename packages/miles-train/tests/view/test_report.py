from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from miles_api.errors import DataError
from miles_train.view.command import command
from miles_train.view.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def line(rollout_id: int, *, seconds: dict[str, float] | None = None, **metrics: float | None) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    seconds = seconds or {"generate": 0.2, "train": 0.2, "other": 0.1, "total": 0.5}
    return {
        "kind": "rollout",
        "rollout_id": rollout_id,
        "time": 1000.0 + rollout_id,
        "metrics": named,
        "seconds": seconds,
    }


def eval_line(rollout_id: int, **rewards: float) -> dict[str, Any]:
    metrics = {f"eval/{dataset}/reward": reward for dataset, reward in rewards.items()}
    return {"kind": "eval", "rollout_id": rollout_id, "time": 1000.0, "metrics": metrics, "seconds": {}}


def sample(**fields: Any) -> dict[str, Any]:
    return {"group_index": 0, "index": 0, "prompt": "p", "response": "r", "label": "l", "reward": 1.0} | fields


class Page(html.parser.HTMLParser):
    """The page as a browser's parser would split it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self._inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = (tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._inside
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[str(attributes["id"])] = json.loads(data)
        elif tag == "script":
            self.scripts.append(data)
        elif tag != "style":
            self.text += data

    def charts(self, section: str) -> dict[str, Any]:
        return {chart["title"]: chart for chart in self.data["chart-data"]["sections"][section]}


def page_of(run: Path) -> Page:
    return Page(write_report(run))


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_a_report_shows_rewards_first_to_last_with_every_held_out_set(make_run):
    lines = [line(i, rollout__reward=i / 19, rollout__tokens=100.0) for i in range(20)]
    lines += [eval_line(0, sort=0.1, reverse=0.2), eval_line(19, sort=0.9, reverse=0.7)]
    page = page_of(make_run(lines, summary={"status": "finished", "title": "sorting", "started": 0, "finished": 90}))
    text = words(page)
    assert "sorting" in text
    assert "finished" in text
    assert "1 min 30 s" in text
    assert "Held-out: sort 0.1 → 0.9" in text
    assert "Held-out: reverse 0.2 → 0.7" in text
    assert "Training reward 0 → 0.763 mean of the last 10" in text
    reward = page.charts("reward")["Reward"]
    assert [series["name"] for series in reward["series"]] == [
        "training reward",
        "mean over 5 rollouts",
        "held-out reward: sort",
        "held-out reward: reverse",
    ]
    assert page.data["chart-data"]["x"]["eval"]["first"] == [0, 19]


def test_a_response_that_closes_the_script_stays_text(make_run):
    chat = [{"role": "user", "content": EVIL}]
    evil = sample(prompt=chat, response=EVIL, label={"a": EVIL}, status=EVIL, metadata={EVIL: EVIL})
    hook = {"process": EVIL, "hook": EVIL, "reference": EVIL, "file": EVIL, "calls": 1, "seconds": 1}
    run = make_run(
        [line(0, **{f"hook__{EVIL}": 1.0})],
        [{"kind": "train", "rollout_id": 0, "samples": [evil]}],
        summary={"status": "failed", "title": EVIL, "error": EVIL, "notes": [EVIL]},
        hooks=[hook],
        config=f'name = "{EVIL}"  # {EVIL}\n',
    )
    page = page_of(run)
    assert "img" not in page.tags
    assert len(page.scripts) == 2
    assert not any("alert" in script for script in page.scripts)
    group = page.data["sample-data"]["train"]["rollouts"][0]["groups"][0]
    assert group["samples"][0]["response"] == EVIL
    assert group["prompt"] == [{"role": "user", "content": EVIL}]
    assert page.text.count(EVIL) >= 6


def test_embedded_data_has_nothing_that_an_html_parser_could_take_for_markup(make_run):
    samples = [{"kind": "train", "rollout_id": 0, "samples": [sample(response="<!-- <script> & </SCRIPT \u2028")]}]
    text = write_report(make_run([line(0, **{"<b>": 1.0})], samples)).read_text(encoding="utf-8")
    blocks = re.findall(r'<script type="application/json" id="[a-z-]+">(.*)</script>', text)
    assert len(blocks) == 2
    assert not re.search("[<>&\u2028]", "".join(blocks))
    assert "\\u003c!-- \\u003cscript" in blocks[1]


def test_a_page_loads_nothing_and_runs_only_our_scripts(make_run):
    path = write_report(make_run([line(0, rollout__reward=1.0)]))
    page = Page(path)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    text = path.read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in text
    assert text.count("sha256-") == len(page.scripts)
    assert not re.search(r"url\(|@import|innerHTML|fetch\(", text)


def test_a_failed_run_shows_its_traceback(make_run):
    error = 'Traceback (most recent call last):\n  File "t.py", line 1\nValueError: <b>'
    page = page_of(make_run([line(0)], summary={"status": "failed", "error": error}))
    assert "The run failed" in page.text
    assert error in page.text


def test_an_interrupted_run_is_not_said_to_have_failed(make_run):
    page = page_of(make_run([line(0)], summary={"status": "interrupted", "error": "stopped by SIGTERM"}))
    assert "stopped by SIGTERM" in page.text
    assert "The run was interrupted" in page.text
    assert ("class", "box error") not in page.attributes
    assert "The run failed" not in page.text


@pytest.mark.parametrize("missing", ["config.toml", "metrics.jsonl", "samples.jsonl", "hooks.json", "summary.json"])
def test_any_file_may_be_missing(make_run, missing):
    hook = {"process": "p", "hook": "reward", "reference": "r", "calls": 1, "seconds": 1, "errors": 0}
    samples = [{"kind": "train", "rollout_id": 0, "samples": [sample()]}]
    summary = {"status": "finished"}
    run = make_run([line(0)], samples, summary=summary, hooks=[hook], config="[run]\n")
    (run / missing).unlink()
    text = words(page_of(run))
    assert missing == "samples.jsonl" or f"{missing} is missing" in text


def test_a_run_that_died_before_its_first_rollout_still_has_a_report(make_run):
    first = {"kind": "run", "rollout_id": -1, "time": 5.0, "metrics": {}, "seconds": {"ray": 4.0, "engines": 2.0}}
    text = words(page_of(make_run([first], summary={"status": "failed", "error": "no GPU"})))
    assert "No rollout was recorded" in text
    assert "no GPU" in text


def test_half_a_last_line_costs_that_line_only(make_run):
    run = make_run([line(0, rollout__reward=0.5)], [{"kind": "train", "rollout_id": 0, "samples": [sample()]}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"kind": "rollout", "rollout_id": 1, "samp')
    page = page_of(run)
    assert "metrics.jsonl: 1 line could not be read" in page.text
    assert page.data["chart-data"]["x"]["rollout"]["first"] == [0]
    assert len(page.data["sample-data"]["train"]["rollouts"]) == 1


def test_files_that_hold_something_else_are_said_and_survived(make_run):
    run = make_run([line(0)], summary=["not", "a table"], hooks={"not": "a list"})
    (run / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1, 2]\n"x"\n{"kind": "rollout", "rollout_id": 3, "metrics": [1]}\n'
    )
    text = words(page_of(run))
    assert "summary.json does not hold a table" in text
    assert "hooks.json does not hold a list" in text
    assert "4 lines could not be read" in text


def test_a_rollout_that_was_done_twice_counts_once_and_the_later_one_wins(make_run):
    lines = [line(0, rollout__reward=0.1), line(1, rollout__reward=0.2), line(1, rollout__reward=0.7)]
    page = page_of(make_run(lines))
    assert page.charts("reward")["Reward"]["series"][0]["y"] == [0.1, 0.7]


def test_numbers_that_are_not_finite_are_marked_and_named(make_run):
    lines = [line(0, train__loss=1.0), line(1, train__loss=float("nan")), line(2, train__loss=None)]
    page = page_of(make_run(lines))
    loss = page.charts("train")["Loss"]["series"][0]
    assert loss["y"] == [1.0, None, None]
    assert loss["bad"] == [1, 2]
    assert "train/loss was not finite in 2 rollouts, first in 1" in page.text


def test_ten_thousand_rollouts_make_a_page_of_modest_size_that_still_shows_a_spike(make_run):
    names = [f"train__metric_{i}" for i in range(10)]
    lines = [line(i, train__logprob_gap_max=1e-6, **dict.fromkeys(names, i / 3)) for i in range(10_000)]
    lines[7_001]["metrics"]["train/logprob_gap_max"] = 0.5
    response = "x" * 500
    samples = [{"kind": "train", "rollout_id": i, "samples": [sample(response=response)] * 8} for i in range(10_000)]
    run = make_run(lines, samples)
    page = page_of(run)
    gap = page.charts("gap")["Log-prob gap, trainer against rollout"]["series"][0]
    assert len(gap["y"]) <= 600
    assert max(gap["hi"]) == 0.5
    shown = page.data["sample-data"]["train"]
    assert shown["of"] == 10_000
    assert [shown["rollouts"][place]["rollout_id"] for place in (0, -1)] == [0, 9_999]
    assert (run / "report.html").stat().st_size < 5_000_000
    assert "the log-prob gap was above 1e-4 in rollout 7,001" in page.text


def test_a_long_response_keeps_its_beginning_and_its_end(make_run):
    response = "begin " + "x" * 50_000 + " the answer is 4"
    page = page_of(make_run([line(0)], [{"kind": "eval", "rollout_id": 0, "samples": [sample(response=response)]}]))
    shown = page.data["sample-data"]["eval"]["rollouts"][0]["groups"][0]["samples"][0]["response"]
    assert shown.startswith("begin x")
    assert shown.endswith("the answer is 4")
    assert "44,022 characters left out" in shown


def test_samples_of_a_group_share_its_prompt_and_groups_of_two_datasets_stay_apart(make_run):
    samples = [sample(index=0), sample(index=1, reward={"right": 1.0}), sample(index=2, prompt="another")]
    page = page_of(make_run([line(0)], [{"kind": "train", "rollout_id": 0, "samples": samples}]))
    groups = page.data["sample-data"]["train"]["rollouts"][0]["groups"]
    assert [(group["prompt"], len(group["samples"])) for group in groups] == [("p", 2), ("another", 1)]
    assert groups[0]["samples"][1]["reward"] == {"right": 1.0}


def test_metadata_of_a_prompt_stands_in_its_group_once_and_what_a_conversation_counts_in_each_sample(make_run):
    metadata = {"source": "gsm8k", "tests": [1, 2], "tool_calls": 2}
    samples = [sample(index=i, metadata={**metadata, "seed": i}) for i in range(2)] + [sample(index=2, metadata={})]
    samples += [sample(index=3, group_index=1), sample(index=4, group_index=2, metadata=metadata)]
    page = page_of(make_run([line(0)], [{"kind": "train", "rollout_id": 0, "samples": samples}]))
    told, silent, alone = page.data["sample-data"]["train"]["rollouts"][0]["groups"]
    assert told["metadata"] == silent["metadata"] == {}
    assert [one["metadata"] for one in told["samples"]] == [metadata | {"seed": 0}, metadata | {"seed": 1}, {}]
    assert alone["metadata"] == {"source": "gsm8k", "tests": [1, 2]}
    assert alone["samples"][0]["metadata"] == {"tool_calls": 2}


def test_the_share_that_is_neither_generation_nor_training_is_said(make_run):
    seconds = {"generate": 5.0, "train": 3.0, "weight_sync": 1.5, "other": 0.5, "total": 10.0}
    text = words(page_of(make_run([line(i, seconds=seconds) for i in range(2)])))
    assert "20.0 % of 20 s in rollouts was neither generation nor training (weight sync 15.0 %, other 5.0 %)" in text


def test_an_evaluation_timed_on_its_own_line_counts_in_its_rollout(make_run):
    evaluation = {"kind": "eval", "rollout_id": 0, "time": 1.0, "metrics": {}, "seconds": {"eval": 5.0}}
    before = {**evaluation, "rollout_id": -1}
    seconds = {"generate": 2.0, "train": 3.0, "total": 5.0}
    text = words(page_of(make_run([before, line(0, seconds=seconds), evaluation])))
    assert "50.0 % of 10 s in rollouts was neither generation nor training (eval 50.0 %)" in text
    assert "Start-up, before the first rollout: first evaluation 5 s" in text


def test_hooks_are_added_up_over_processes_and_differing_files_are_pointed_out(make_run):
    hook = {"hook": "pg_loss_reducer", "reference": "dr_grpo", "distribution": "contrib", "version": "1.2"}
    rank = {**hook, "file": "/x/dr_grpo.py", "sha256": "a" * 64, "calls": 500, "seconds": 0.02, "errors": 0}
    run = make_run([line(0)], hooks=[{**rank, "process": f"rank {i}"} for i in range(5)])
    text = words(page_of(run))
    assert "rank 0, rank 1, rank 2 and 2 more" in text
    assert "2,500 0.1 s 40" in text
    assert "different files" not in text
    run = make_run([line(0)], hooks=[rank, {**rank, "sha256": "b" * 64, "errors": 2, "calls": 0}])
    text = words(page_of(run))
    assert "processes ran different files or versions of the same hook" in text
    assert "raised 2 errors" in text
    assert "was loaded and never called" in text
    run = make_run([line(0)], hooks=[{**rank, "reference": "default", "calls": 0}])
    assert "never called" not in words(page_of(run))


def test_a_class_whose_calls_nobody_counts_is_not_said_to_have_none(make_run):
    names = ("data_source", "convert_samples")
    hooks = [{"hook": name, "reference": "default", "process": "rollout"} for name in names]
    text = words(page_of(make_run([line(0)], hooks=hooks)))
    assert "data_sourcerollout default — – — — — 0 convert_samplesrollout default — – 0 — — 0" in text


def test_metrics_that_no_chart_knows_are_shown_too(make_run):
    page = page_of(make_run([line(0, search__calls=2.0, rollout__reward=1.0)]))
    assert list(page.charts("more")) == ["search/calls"]


def test_the_parts_of_a_reward_share_a_chart_and_are_no_datasets(make_run):
    run = make_run([
        line(0, rollout__reward=1.5, rollout__reward__math=1.0, rollout__reward__length=0.5),
        eval_line(0, **{"held/out": 0.5, "held/out/reward/math": 0.2, "x": 1.0}),
    ])  # fmt: skip
    page = page_of(run)
    charts = page.charts("reward")
    assert [one["name"] for one in charts["Reward, by part"]["series"]] == ["math", "length"]
    held_out = [one["name"] for one in charts["Reward"]["series"] if "held-out" in one["name"]]
    assert held_out == ["held-out reward: held/out", "held-out reward: x"]
    assert "rollout/reward/math" not in page.charts("more")


def test_secrets_of_the_configuration_are_not_shown(make_run):
    config = '[router]\nrouter_token = "hunter2"  # command line\nmax_tokens_per_gpu = 8192  # run.toml\n'
    page = page_of(make_run([line(0)], config=config))
    assert "hunter2" not in page.text
    assert "router_token = (not shown)" in page.text
    assert "max_tokens_per_gpu = 8192  # run.toml" in page.text


def test_a_second_report_replaces_the_first_and_leaves_nothing_behind(make_run):
    run = make_run([line(0)])
    write_report(run)
    (run / "summary.json").write_text('{"title": "renamed"}')
    assert "renamed" in page_of(run).text
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html", "summary.json"]


def test_a_run_that_goes_on_is_reported_as_such_and_misses_no_hooks_yet(make_run):
    text = words(page_of(make_run([line(0)], summary={"status": "running"}, config="[run]\n")))
    assert "This run had not ended when this page was written." in text
    assert "missing" not in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_where_the_report_is(make_run, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    command.configure(parser)
    run = make_run([line(0)])
    assert command.run(parser.parse_args([str(run)])) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_the_view_runs_as_a_module_without_torch_or_ray(make_run):
    run = make_run([line(0)])
    code = (
        "import runpy, sys; sys.argv = ['report', sys.argv[1]]\n"
        "import miles_train.view.progress, miles_train.view.sinks\n"
        "try: runpy.run_module('miles_train.view.report', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'ray', 'megatron', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(run)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")


def test_what_befell_a_hook_is_told(make_run):
    hook = {"hook": "dynamic_filter", "reference": "f.py:keep", "file": "/x/f.py", "sha256": "a" * 64}
    checked = {**hook, "process": "driver", "called": True, "note": "", "checkable": False}
    ran = {**hook, "process": "rollout", "calls": 40, "seconds": 0.2, "errors": 3, "timeouts": 2, "retries": 5,
           "skipped": 7, "drops": {"zero_std": 11, "hook_error": 1}, "checkable": False}  # fmt: skip
    again = {**hook, "process": "another", "drops": {"zero_std": 0, "hook_error": 0}}
    text = words(page_of(make_run([line(0)], hooks=[checked, ran, again])))
    assert "dynamic_filterrollout, another f.py:keep" in text
    assert "not checkable" in text
    assert "407 skipped" in text
    assert "32 timed out, 5 retried" in text
    assert "12zero_std 11, hook_error 1" in text
    assert "hook dynamic_filter (f.py:keep) raised 3 errors and timed out 2 times" in text


def test_a_hook_that_the_run_does_not_call_says_why_and_is_no_cause_for_alarm(make_run):
    hook = {"hook": "reward", "reference": "r.py:score", "file": "/x/r.py", "sha256": "a" * 64}
    idle = {**hook, "process": "driver", "called": False, "note": "supervised, nothing is sampled"}
    text = words(page_of(make_run([line(0)], hooks=[idle])))
    assert "rewardnot called: supervised, nothing is sampled" in text
    assert "never called" not in text
    assert "Dropped" not in text


def test_a_hook_that_only_ever_timed_out_deserves_a_look_too(make_run):
    ran = {"hook": "reward", "reference": "r.py:score", "process": "rollout", "calls": 40, "timeouts": 40}
    assert "hook reward (r.py:score) timed out 40 times" in words(page_of(make_run([line(0)], hooks=[ran])))


def test_steps_that_changed_nothing_deserve_a_look_with_their_cause(make_run):
    lines = [line(i, train__zero_gradient_steps=0.0, train__loss=1.0) for i in range(3)]
    page = page_of(make_run(lines))
    assert "changed nothing" not in words(page)
    assert "Steps that changed nothing" not in page.charts("train")
    lines[1]["metrics"] |= {"train/zero_gradient_steps": 2.0, "train/zero_gradient/clipped": 2.0}
    page = page_of(make_run(lines))
    assert "2 optimizer steps changed nothing, in rollout 1: every token with an advantage was clipped" in words(page)
    chart = page.charts("train")["Steps that changed nothing"]
    assert [(series["name"], series["y"]) for series in chart["series"]] == [
        ("changed nothing", [0.0, 2.0, 0.0]),
        ("clipped", [0.0, 2.0, 0.0]),
    ]
    assert list(page.charts("more")) == []


def test_every_number_of_the_run_is_listed_with_what_it_says(make_run):
    text = words(page_of(make_run([line(0, train__mismatch_ess=0.97), line(1, mine=3.0), eval_line(1, sort=0.25)])))
    assert "eval/sort/reward0.25Mean reward of the evaluation's responses." in text
    assert "train/mismatch_ess0.97Effective sample size" in text
    assert "mine3Reported by a hook." in text


def test_what_clips_and_how_far_the_policy_moved_stand_with_training_and_are_explained(make_run):
    metrics = ("pg_clipfrac", "kl_loss", "kl_reward", "opd_kl", "padding_share", "mismatch_k1")
    page = page_of(make_run([line(0, **{f"train__{name}": 0.1 for name in metrics})]))
    training = page.charts("train")
    assert all(training[title]["text"] for title in ("Clip fraction", "KL divergence", "Micro-batches and ranks"))
    assert list(page.charts("gap")) == ["KL divergence, trainer against rollout"]


def test_a_group_with_equal_rewards_is_not_said_to_teach_nothing_whatever_the_objective(make_run):
    page = page_of(make_run([line(0, rollout__equal_groups=0.25)]))
    for said in (page.charts("rollout")["Groups with equal rewards"]["text"], page.text):
        assert re.search(r"unless.* critic.* whitening.* KL .*teacher", said)


def test_the_axis_of_a_share_ends_at_100_percent_unless_the_run_is_above_it(make_run):
    shares = {"train__mismatch_ess": 1.0, "train__pg_clipfrac": 0.02}
    page = page_of(make_run([line(i, train__micro_batch_fill=0.4 + i, train__loss=0.5, **shares) for i in range(2)]))
    assert page.charts("gap")["Effective sample size"]["most"] == 1
    assert {title: chart["most"] for title, chart in page.charts("train").items()} == {
        "Loss": None, "Clip fraction": 1, "Micro-batches and ranks": None,
    }  # fmt: skip
