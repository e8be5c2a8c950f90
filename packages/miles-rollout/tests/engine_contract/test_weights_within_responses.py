"""Responses that outlive a push of weights: each token has the log-prob of the weights that its sample names for it."""

from __future__ import annotations

import json
import threading
import time

import pytest

from miles_api.sample import Sample

SHORT, LONG, SIZE = 8, 600, 2
HOOKS = """
import json
from pathlib import Path
from miles_rollout.generate.single_turn import generate

async def fn(input):
    long = input.sample.group_index in {long}
    input.sampling_params |= {{"ignore_eos": True, "max_new_tokens": {length} if long else {short}}}
    return await generate(input)

def keep(args, data):
    Path({file!r}).write_text(json.dumps([sample.to_dict() for group in data for sample in group]))
"""


class Run:
    """A rollout process on one engine, in which the groups `long` have long responses.

    Version `n` of the weights is the model `(n + 1) % 2`.
    """

    def __init__(self, wire, worker, hook, tmp_path, *, long, **options):
        self.wire, self._file = wire, tmp_path / "samples.json"
        prompts = tmp_path / "own.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"{n}>", "label": "1"}) + "\n" for n in range(9)))
        generate = hook(HOOKS.format(long=long, length=LONG, short=SHORT, file=str(self._file)))
        self.push(1)
        key = wire.client.headers["authorization"].removeprefix("Bearer ")
        self.worker = worker(
            url=str(wire.client.base_url).rstrip("/"), router_token=key, hf_checkpoint=wire.models.path(0),
            prompt_data=str(prompts), n_samples_per_prompt=SIZE, rollout_max_response_len=LONG,
            custom_generate_function_path=generate, rollout_sample_filter_path=generate.replace(":fn", ":keep"),
            **options,
        )  # fmt: skip

    def push(self, version):
        """Give the engine new weights, as the trainer does."""
        told = {"model_path": self.wire.models.path((version + 1) % 2), "weight_version": str(version)}
        for path, body in {
            "/pause_generation": {"mode": "retract"}, "/update_weights_from_disk": told, "/continue_generation": {},
        }.items():  # fmt: skip
            answer = self.wire.client.post(path, json=body)
            assert answer.status_code == 200, answer.text

    def generate(self, rollout_id, version):
        """Make a rollout; return it and its samples."""
        made = self.worker.generate(rollout_id, version)
        return made, [Sample.from_dict(one) for one in json.loads(self._file.read_text())]

    def wait_until_busy(self, engine_made):
        """Wait until requests run at the engine."""
        while not engine_made.is_set():
            loads = self.wire.client.get("/v1/loads").json()["loads"]
            if sum(load["num_running_reqs"] for load in loads) >= SIZE:
                return
            time.sleep(0.005)

    def require_parity(self, samples):
        """Compare each token's log-prob with that of the weights which the sample names for it."""
        for sample in samples:
            start = len(sample.tokens) - sample.response_length
            ends = [*sample.weight_version_starts[1:], sample.response_length]
            for version, begin, end in zip(sample.weight_versions, sample.weight_version_starts, ends, strict=True):
                expected = self.wire.models.log_probs(sample.tokens, start, which=(int(version) + 1) % 2)
                assert sample.rollout_log_probs[begin:end] == pytest.approx(expected[begin:end], abs=1e-4)


@pytest.fixture
def run(wire, worker, hook, tmp_path):
    def start(**options):
        return Run(wire, worker, hook, tmp_path, **options)

    return start


def test_what_is_cut_goes_on_under_the_next_weights(run):
    rollouts = run(long=[0, 2], partial_rollout=True, over_sampling_batch_size=2, rollout_batch_size=1)
    first, samples = rollouts.generate(0, "1")
    assert first["batch"]["group_indices"] == [1] * SIZE
    rollouts.require_parity(samples)
    rollouts.push(2)
    (cut,) = rollouts.worker._data_source._buffer
    begun = [sample.response_length for sample in cut]
    assert all(0 < length < LONG for length in begun)
    second, samples = rollouts.generate(1, "2")
    assert [sample.weight_version_starts for sample in samples] == [[0, length] for length in begun]
    assert [sample.weight_versions for sample in samples] == [["1", "2"]] * SIZE
    assert second["batch"]["response_lengths"] == [LONG] * SIZE
    rollouts.require_parity(samples)


@pytest.mark.parametrize("masks", [False, True])
def test_weights_that_come_in_the_middle_of_a_rollout_make_the_rest_of_it(run, masks):
    rollouts = run(
        long=[0], rollout_schedule="in-flight", rollout_batch_size=1, mask_offpolicy_in_partial_rollout=masks
    )
    made = threading.Event()

    def push():
        rollouts.wait_until_busy(made)
        rollouts.push(2)

    pushing = threading.Thread(target=push)
    pushing.start()
    rollout, samples = rollouts.generate(0, "1")
    made.set()
    pushing.join()
    assert [sample.weight_versions for sample in samples] == [["1", "2"]] * SIZE
    rollouts.require_parity(samples)
    old = [sample.weight_version_starts[1] for sample in samples]
    assert all(0 < count < LONG for count in old)
    if masks:
        assert rollout["batch"]["loss_masks"] == [[0] * count + [1] * (LONG - count) for count in old]
    else:
        assert rollout["batch"]["loss_masks"] == [[1] * LONG] * SIZE
        # One version newer than what it was begun with: the driver counts from the weights that train on it.
        assert rollout["metrics"]["rollout/staleness"] == pytest.approx(sum(old) / (SIZE * LONG) - 1)
