from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from miles_api.errors import ConfigError
from miles_train.options import LoggingOptions
from miles_train.view.sinks import MetricsWriter, check_sinks, make_sinks


class FakeWandb(types.ModuleType):
    """As much of wandb as a sink uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []

    def init(self, **how):
        self.calls.append(("init", how["project"], how["config"], how["id"], how["resume"]))
        return self

    def define_metric(self, name, step_metric=None):
        self.calls.append(("define", name, step_metric))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish",))


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write("rollout", 3, {"train/loss": 0.5}, {"total": 1.0})
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {key: line[key] for key in ("kind", "rollout_id", "metrics", "seconds")} == {
        "kind": "rollout",
        "rollout_id": 3,
        "metrics": {"train/loss": 0.5},
        "seconds": {"total": 1.0},
    }
    assert line["time"] > 1_000_000_000


def test_a_resumed_run_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "run"}\n')
    with MetricsWriter(path) as writer:
        writer.write("eval", 1, {}, {})
    with MetricsWriter(path) as writer:
        writer.write("eval", 2, {}, {})
    lines = path.read_text().splitlines()
    assert lines[0] == '{"kind": "run"}'
    assert [json.loads(line)["rollout_id"] for line in lines[1:]] == [1, 2]


def test_a_number_that_is_not_finite_becomes_null_so_that_any_reader_can_read_the_line(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write("rollout", 0, {"a": float("nan"), "b": float("inf")}, {})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["metrics"] == {"a": None, "b": None}


def test_no_sink_is_made_that_was_not_asked_for(tmp_path):
    assert make_sinks(LoggingOptions(), tmp_path, {}) == []
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = make_sinks(LoggingOptions(use_tensorboard=True), tmp_path, {})
    sink.log(0, {"rollout/reward": 0.25, "train/lr": 1e-6})
    sink.log(7, {"rollout/reward": 0.75})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("rollout/reward")] == [(0, 0.25), (7, 0.75)]
    assert events.Tags()["scalars"] == ["rollout/reward", "train/lr"]


def test_tensorboard_hides_what_a_resumed_run_makes_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, points in ((None, {0: 0.25, 1: 0.5, 2: 0.75}), (1, {2: 4.0})):
        (sink,) = make_sinks(LoggingOptions(use_tensorboard=True), tmp_path, {}, after=after)
        for step, value in points.items():
            sink.log(step, {"rollout/reward": value})
        sink.close()
        # files are read in the order of the second in their names
        for file in (tmp_path / "tensorboard").glob("events.out.tfevents.*"):
            file.rename(file.with_name(f"events.out.tfevents.{after or 0}.{file.name.removeprefix('events.out.')}"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("rollout/reward")] == [(0, 0.25), (1, 0.5), (2, 4.0)]


def test_tensorboard_needs_no_torch(tmp_path):
    pytest.importorskip("tensorboard")
    code = (
        "import sys, pathlib\n"
        "from miles_train.options import LoggingOptions\n"
        "from miles_train.view.sinks import make_sinks\n"
        "assert 'tensorboard' not in sys.modules\n"
        "make_sinks(LoggingOptions(use_tensorboard=True), pathlib.Path(sys.argv[1]), {})[0].close()\n"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize(("package", "flag"), [("tensorboard", "--use-tensorboard"), ("wandb", "--use-wandb")])
def test_a_missing_package_is_told_with_the_flag_and_the_command(monkeypatch, package, flag):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hide(package), *sys.meta_path])
    with pytest.raises(ConfigError, match=rf"{flag} needs the {package} package: pip install {package}"):
        check_sinks(LoggingOptions(**{f"use_{package}": True}))


class _Hide:
    """An importer that says a package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_wandb_gets_the_config_and_the_rollout_as_the_step_of_every_metric(monkeypatch, tmp_path):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = LoggingOptions(use_wandb=True, wandb_project="sorting")
    (sink,) = make_sinks(options, tmp_path, {"lr": 1e-6}, run_id="abc")
    sink.log(4, {"rollout/reward": 0.5})
    sink.close()
    assert wandb.calls == [
        ("init", "sorting", {"lr": 1e-6}, "abc", "allow"),
        ("define", "rollout_id", None),
        ("define", "*", "rollout_id"),
        ("log", {"rollout/reward": 0.5, "rollout_id": 4}),
        ("finish",),
    ]


def test_a_project_without_wandb_is_a_mistake_that_is_told():
    with pytest.raises(ConfigError, match="--wandb-project does nothing without --use-wandb"):
        check_sinks(LoggingOptions(wandb_project="sorting"))
