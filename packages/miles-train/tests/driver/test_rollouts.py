"""Rollouts are made as each is needed or one ahead; either way each is made once, in order, and saved as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_train.driver.remote import Pending
from miles_train.driver.rollouts import Rollouts


class Service:
    """A rollout process that makes a rollout when somebody waits for it; `events` is what it was told, in order."""

    def __init__(self):
        self.events, self.metrics = [], {}

    def begin_split(self, method, key, rollout_id, weights):
        self.events.append(("begin", rollout_id, weights))

        def wait():
            self.events.append(("made", rollout_id))
            return {"metrics": {"rollout/reward": 1.0, **self.metrics}, "seconds": {"generate": 2.0, "convert": 1.0}}

        return Pending(f"batch {rollout_id}", wait)

    def call(self, method, rollout_id, directory):
        self.events.append((method, rollout_id))
        Path(directory, "state").write_text(f"after {rollout_id}")


@pytest.fixture
def service():
    return Service()


def test_in_turn_each_rollout_is_made_when_it_is_needed(service, tmp_path):
    rollouts = Rollouts(service, 2, ahead=False, aside=tmp_path / "aside")
    for rollout_id in range(2):
        rollout = rollouts.take(rollout_id, rollout_id, str(rollout_id))
        rollouts.begin(rollout_id + 1, rollout_id, str(rollout_id), saves=True)
        rollouts.settle()
        assert rollout.batch == f"batch {rollout_id}"
        metrics, seconds = rollouts.row(rollout, rollout_id)
        assert metrics == {"rollout/reward": 1.0}
        assert seconds == {"generate": 2.0, "convert": 1.0}
    assert service.events == [("begin", 0, "0"), ("made", 0), ("begin", 1, "1"), ("made", 1)]


def test_ahead_the_next_one_is_begun_with_older_weights_and_made_before_new_ones_come(service, tmp_path):
    rollouts = Rollouts(service, 2, ahead=True, aside=tmp_path / "aside")
    staleness = []
    for version in range(2):
        rollout = rollouts.take(version, version, str(version))
        rollouts.begin(version + 1, version, str(version), saves=False)
        service.events.append(("train", version))
        rollouts.settle()
        service.events.append(("push", version + 1))
        staleness.append(rollouts.row(rollout, version)[0]["rollout/staleness"])
    assert service.events == [
        ("begin", 0, "0"), ("made", 0), ("begin", 1, "0"), ("train", 0), ("made", 1), ("push", 1), ("train", 1),
        ("push", 2),
    ]  # fmt: skip
    assert staleness == [0.0, 1.0]


def test_in_flight_new_weights_do_not_wait_for_the_rollout_that_is_being_made(service, tmp_path):
    rollouts, rows = Rollouts(service, 2, ahead=True, in_flight=True, aside=tmp_path / "aside"), []
    for version in range(2):
        # Half of the tokens are of the weights that came meanwhile.
        service.metrics = {"rollout/staleness": -0.5 * version, "rollout/staleness_max": 0.0}
        rollout = rollouts.take(version, version, str(version))
        rollouts.begin(version + 1, version, str(version), saves=False)
        rollouts.settle()
        service.events.append(("push", version + 1))
        rows.append(rollouts.row(rollout, version)[0])
    assert service.events == [
        ("begin", 0, "0"), ("made", 0), ("begin", 1, "0"), ("push", 1), ("made", 1), ("push", 2),
    ]  # fmt: skip
    assert [(row["rollout/staleness"], row["rollout/staleness_max"]) for row in rows] == [(0.0, 0.0), (0.5, 1.0)]


def test_a_checkpoint_holds_the_rollout_process_as_it_was_before_the_next_rollout_began(service, tmp_path):
    rollouts = Rollouts(service, 3, ahead=True, aside=tmp_path / "aside")
    rollouts.take(0, 0, "0")
    rollouts.begin(1, 0, "0", saves=True)
    rollouts.settle()
    rollouts.save(0, str(tmp_path))
    assert (tmp_path / "state").read_text() == "after 0"
    assert service.events.index(("save", 0)) < service.events.index(("begin", 1, "0"))
    assert (tmp_path / "aside").exists()
    # Also what a run that was killed has left is not taken for a state of this one.
    again = Rollouts(service, 3, ahead=True, aside=tmp_path / "aside")
    assert not (tmp_path / "aside").exists()
    again.save(1, str(tmp_path))
    assert (tmp_path / "state").read_text() == "after 1"


def test_after_the_last_rollout_the_process_saves_what_it_has_come_to(service, tmp_path):
    rollouts = Rollouts(service, 1, ahead=True, aside=tmp_path / "aside")
    rollouts.take(0, 0, "0")
    rollouts.begin(1, 0, "0", saves=True)
    rollouts.save(0, str(tmp_path))
    assert service.events[-1] == ("save", 0)
