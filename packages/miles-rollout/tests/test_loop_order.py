"""With --deterministic the default loop keeps, drops and puts back the same groups however long each takes."""

import json
from collections import Counter

import pytest

HOOKS = """
import asyncio, json, os, random, time
from pathlib import Path

HERE = Path(__file__).parent
DELAYS = random.Random(HERE.name)

def note(what, value):
    with open(HERE / "log.jsonl", "a") as log:
        log.write(json.dumps([what, value]) + "\\n")

def indices(groups):
    return [group[0].group_index for group in groups]

class Source:
    def __init__(self, args):
        self.given, self.back, self.made = args.n_samples_per_prompt, [], 0
    def get_samples(self, n):
        from miles_api.sample import Sample
        groups, self.back = self.back[:n], self.back[n:]
        while len(groups) < n:
            first = self.made * self.given
            numbers = range(first, first + self.given)
            groups.append([Sample(prompt="x", index=i, group_index=self.made, rollout_id=i) for i in numbers])
            self.made += 1
        note("handed out", indices(groups))
        return groups
    def add_samples(self, groups):
        note("came back", indices(groups))
        self.back += groups
    def save(self, rollout_id): ...
    def load(self, rollout_id=None): ...

async def generate(input):
    await asyncio.sleep(DELAYS.random() / 50)
    sample = input.sample
    sample.tokens, sample.response_length = [1, 2, sample.index], 2
    return sample

def reward(args, sample):
    time.sleep(DELAYS.random() / 100)
    if sample.group_index in (3, 5, 12):
        raise ValueError("no score")
    return float(sample.index % 5)

async def keep(args, samples):
    note("judged", samples[0].group_index)
    await asyncio.sleep(DELAYS.random() / 100)
    return samples[0].group_index % 3 != 1

def everything(args, groups, source):
    note("everything", indices(groups))
"""


@pytest.fixture
def story(worker, tmp_path):
    """What happens in three rollouts, with delays drawn from `number`."""

    def run(number, **values):
        folder = tmp_path / f"{number}-{len(values)}"
        folder.mkdir()
        file = folder / "hooks.py"
        file.write_text(HOOKS)
        running = worker(
            rm_type=None, rollout_batch_size=4, n_samples_per_prompt=2, over_sampling_batch_size=7, hook_retries=0,
            hook_error_budget="9", data_source_path=f"{file}:Source", custom_generate_function_path=f"{file}:generate",
            custom_rm_path=f"{file}:reward", dynamic_sampling_filter_path=f"{file}:keep",
            rollout_all_samples_process_path=f"{file}:everything", **values,
        )  # fmt: skip
        results = []
        for rollout in range(3):
            output = running.generate(rollout, "1")
            # By the file's path, a reason differs from run to run.
            counts = [(k.replace(str(folder), ""), v) for k, v in output["metrics"].items() if k.startswith("rollout/")]
            results.append((output["batch"], counts))
        return results, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    return run


def test_groups_are_judged_and_put_back_in_the_order_they_were_handed_out(story):
    first, *others = [story(number, deterministic=True) for number in range(4)]
    for other in others:
        assert other == first
    log = first[1]
    judged = [value for what, value in log if what == "judged"]
    assert {what for what, _ in log} == {"handed out", "came back", "judged", "everything"}
    # Groups 3 and 5 get no score, not at their second chance either, and are never judged.
    assert judged[:6] == [0, 1, 2, 4, 6, 7]
    assert [len(batch["tokens"]) for batch, _ in first[0]] == [8, 8, 8]


def test_without_the_option_those_that_end_first_are_kept(story):
    assert len({json.dumps(story(number)[1]) for number in range(4)}) > 1


def test_a_group_that_starts_over_draws_the_same_again_and_a_later_epoch_draws_anew(worker, fake_engine, hook):
    body = (
        "calls = []\n"
        "def fn(args, sample):\n"
        "    calls.append(sample.index)\n"
        "    if sample.index == 1 and calls.count(1) == 1:\n        raise ValueError('not yet')\n"
        "    return 1.0\n"
    )
    engine = fake_engine()
    running = worker(engine, deterministic=True, custom_rm_path=hook(body), rm_type=None, hook_retries=0)
    for rollout in range(3):
        running.generate(rollout, "1")
    drawn = Counter(
        (tuple(payload["input_ids"]), payload["sampling_params"]["sampling_seed"]) for _, payload in engine.requests
    )
    prompts = Counter(prompt for prompt, _ in drawn)
    # Group 0 twice with its three seeds; its prompt again in the second epoch, with three others.
    assert sorted(drawn.values()) == [1] * 15 + [2] * 3
    assert sorted(prompts.values()) == [3, 3, 3, 3, 6]
