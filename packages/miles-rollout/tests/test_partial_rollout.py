"""Responses that are cut when a rollout has enough go on in the next one, and every token is made and trained once."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from miles_api.errors import ServiceError

TARGET, STARTED, SIZE = 2, 4, 2
LENGTH = 12
FLAGS = {
    "partial_rollout": True, "over_sampling_batch_size": STARTED, "rollout_batch_size": TARGET,
    "n_samples_per_prompt": SIZE, "rollout_max_response_len": LENGTH,
}  # fmt: skip


class Weights:
    """Engines whose token at a position follows from the seed, and its log-prob from the version of the weights too.

    Seeds in `slow` get `step` tokens and then wait until they are aborted; those in `brief` stop after as many. Like
    SGLang's server they know requests by whole ids alone, and have no two with one id.
    """

    def __init__(self, fake_engine, *, prompt, step=3):
        self.version, self.prompt, self.step = 1, prompt, step
        self.slow, self.brief, self.asked, self.made = set(), set(), [], Counter()
        self._here = {}
        self.url = fake_engine(self._answer).url

    def _answer(self, payload):
        if "sampling_params" not in payload:
            if payload["rid"] in self._here:
                self._here[payload["rid"]].set()
            return 200, {}
        if payload["rid"] in self._here:
            return 400, {"error": "Duplicate request ID detected"}
        aborted = self._here[payload["rid"]] = threading.Event()
        params, ids = payload["sampling_params"], payload["input_ids"]
        seed, begun = params["sampling_seed"], len(ids) - self.prompt
        self.asked.append((seed, begun, params["max_new_tokens"]))
        slow = seed in self.slow
        finish = "abort" if slow else "stop" if seed in self.brief else "length"
        count = params["max_new_tokens"] if finish == "length" else min(self.step, params["max_new_tokens"])
        positions = range(begun, begun + count)
        for position in positions:
            self.made[seed, position] += 1
        if slow:
            assert aborted.wait(10)
        return 200, {"text": "x" * count, "output_ids": [self.token(seed, at) for at in positions], "meta_info": {
            "finish_reason": {"type": finish}, "completion_tokens": count,
            "weight_version": str(self.version), "prompt_tokens": len(ids),
            "output_token_logprobs": [[-self.version - at / 100, self.token(seed, at), None] for at in positions],
        }}  # fmt: skip

    @staticmethod
    def token(seed, position):
        return 2 + (seed + position) % 30

    def next(self, version=None):
        """New weights come."""
        self.version = version or self.version + 1


@pytest.fixture
def weights(fake_engine):
    return Weights(fake_engine, prompt=len("say 0>"))


def seeds_of(worker, groups):
    from miles_rollout.generate.single_turn import sampling_seed

    seed = worker._args.rollout_seed
    return {sampling_seed(seed, group * SIZE + n, 0) for group in groups for n in range(SIZE)}


def test_a_cut_response_goes_on_where_it_was_and_every_token_is_made_once(worker, weights):
    rollouts = worker(url=weights.url, **FLAGS)
    weights.slow = seeds_of(rollouts, [0, 3])
    first = rollouts.generate(0, "1")
    assert first["batch"]["group_indices"] == [1, 1, 2, 2]
    assert first["metrics"]["rollout/continued_samples"] == 0
    weights.next()
    weights.slow = seeds_of(rollouts, [4, 5])
    second = rollouts.generate(1, "2")
    # What was begun is handed out first, and as much beside it as over-sampling asks for.
    assert second["batch"]["group_indices"] == [0, 0, 3, 3]
    for seed in seeds_of(rollouts, [0, 3]):
        assert [(begun, most) for one, begun, most in weights.asked if one == seed] == [(0, LENGTH), (3, LENGTH - 3)]
    assert set(weights.made.values()) == {1}
    batch = second["batch"]
    assert batch["rollout_log_probs"] == [
        [-(1 if at < weights.step else 2) - at / 100 for at in range(LENGTH)] for _ in range(4)
    ]
    assert batch["loss_masks"] == [[1] * LENGTH] * 4
    assert batch["weight_versions"] == [["1", "2"]] * 4
    assert second["metrics"]["rollout/continued_samples"] == 4
    assert second["metrics"]["rollout/continued_tokens"] == 4 * weights.step
    assert second["metrics"]["rollout/staleness"] == pytest.approx(weights.step / LENGTH)
    assert second["metrics"]["rollout/staleness_max"] == 1


def test_a_finished_sample_of_a_cut_group_is_neither_generated_nor_scored_again(worker, weights, hook):
    scored = "SEEN = []\ndef fn(args, one):\n    SEEN.append(one.index)\n    return float(SEEN.count(one.index))\n"
    rollouts = worker(url=weights.url, custom_rm_path=hook(scored), **FLAGS)
    cut, done = seeds_of(rollouts, [0])
    weights.slow, weights.brief = {cut} | seeds_of(rollouts, [3]), {done}
    rollouts.generate(0, "1")
    weights.next()
    weights.slow = seeds_of(rollouts, [4, 5])
    again = rollouts.generate(1, "2")["batch"]
    assert again["group_indices"] == [0, 0, 3, 3]
    assert again["raw_reward"] == [1.0] * 4
    assert sorted(again["response_lengths"]) == [weights.step, *[LENGTH] * 3]
    assert [seed for seed, *_ in weights.asked].count(done) == 1
    assert set(weights.made.values()) == {1}


def test_the_mask_leaves_out_the_older_tokens_of_a_response_that_went_on(worker, weights):
    rollouts = worker(url=weights.url, mask_offpolicy_in_partial_rollout=True, **FLAGS)
    weights.slow = seeds_of(rollouts, [0, 3])
    assert rollouts.generate(0, "1")["metrics"]["rollout/offpolicy_masked_tokens"] == 0
    weights.next()
    weights.slow = seeds_of(rollouts, [4, 5])
    made = rollouts.generate(1, "2")
    old, new = weights.step, LENGTH - weights.step
    assert made["batch"]["loss_masks"] == [[0] * old + [1] * new] * 4
    assert made["metrics"]["rollout/offpolicy_masked_tokens"] == 4 * old


def test_a_checkpoint_holds_what_was_cut_and_a_run_that_goes_on_from_it_makes_the_same(worker, weights, tmp_path):
    rollouts = worker(url=weights.url, **FLAGS)
    weights.slow = seeds_of(rollouts, [0, 3])
    rollouts.generate(0, "1")
    rollouts.save(0, str(tmp_path))
    weights.next()
    weights.slow = seeds_of(rollouts, [4, 5])
    expected = rollouts.generate(1, "2")
    weights.next(version=2)
    resumed = worker(url=weights.url, **FLAGS)
    resumed.load(0, str(tmp_path))
    found = resumed.generate(1, "2")
    assert found["batch"] == expected["batch"]
    assert found["metrics"]["rollout/continued_tokens"] == expected["metrics"]["rollout/continued_tokens"]


def test_over_many_rollouts_no_prompt_is_lost_or_doubled_whatever_is_cut(worker, weights):
    rollouts, trained = worker(url=weights.url, **FLAGS), []
    for rollout in range(8):
        # Two of the four groups of each rollout, in turn: some are cut several times.
        source = rollouts._data_source
        begun = [group[0].group_index for group in source._buffer]
        begun += range(source._next_group, source._next_group + STARTED - len(begun))
        weights.slow = seeds_of(rollouts, [begun[rollout % STARTED], begun[(rollout + 1) % STARTED]])
        batch = rollouts.generate(rollout, str(weights.version))["batch"]
        trained += batch["group_indices"][::SIZE]
        assert all(len(column) == LENGTH for column in batch["rollout_log_probs"])
        weights.next()
    assert len(set(trained)) == len(trained) == 8 * TARGET
    assert set(weights.made.values()) == {1}
    waiting = {group[0].group_index for group in rollouts._data_source._buffer}
    assert waiting.isdisjoint(trained)
    assert waiting | set(trained) == set(range(rollouts._data_source._next_group))


def test_newer_and_unknown_weights_stop_the_run_also_where_older_ones_may_train(worker, weights):
    for version in (3, "default"):
        weights.version = version if version == 3 else 1
        rollouts = worker(url=weights.url, **FLAGS)
        with pytest.raises(ServiceError, match="serves what the trainer has not given it"):
            rollouts.generate(0, "2" if version == 3 else "other")


OLDER_HOOK = """
from slime.utils.http_utils import post
from slime.utils.types import Sample

async def fn(args, sample, sampling_params):
    assert args.partial_rollout
    if not sample.tokens:
        sample.tokens = list(range(3, 9))
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sampling_params["max_new_tokens"] -= sample.response_length
    sampling_params["sampling_seed"] = sample.index
    said = await post(url, {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True})
    pairs = said["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        args, tokens=[pair[1] for pair in pairs], log_probs=[pair[0] for pair in pairs], text=said["text"],
        meta_info=said["meta_info"],
    )
    return sample
"""


def test_a_generate_hook_of_an_older_stack_is_handed_what_it_returned_as_aborted(worker, weights, hook):
    rollouts = worker(url=weights.url, custom_generate_function_path=hook(OLDER_HOOK), **FLAGS)
    weights.slow = {0, 1, 6, 7}
    first = rollouts.generate(0, "1")
    assert first["batch"]["group_indices"] == [1, 1, 2, 2]
    weights.next()
    weights.slow = {8, 9, 10, 11}
    second = rollouts.generate(1, "2")
    assert second["batch"]["group_indices"] == [0, 0, 3, 3]
    assert second["batch"]["weight_versions"] == [["1", "2"]] * 4
    assert second["batch"]["response_lengths"] == [LENGTH] * 4
    assert set(weights.made.values()) == {1}
    assert all(stats["errors"] == 0 for stats in rollouts.report())


def test_a_hook_that_does_not_end_when_its_rollout_has_enough_starts_anew(worker, weights, hook):
    quick = """    if sample.group_index in (1, 2):
        sample.tokens = [3]
        sample.append_response_tokens([4], log_probs=[-1.0])
        return sample
    assert args.partial_rollout"""
    deaf = OLDER_HOOK.replace("    return sample", "    await __import__('asyncio').Event().wait()")
    body = deaf.replace("    assert args.partial_rollout", quick)
    rollouts = worker(url=weights.url, custom_generate_function_path=hook(body), hook_timeout=0.5, **FLAGS)
    rollouts.generate(0, "1")
    left = [sample for group in rollouts._data_source._buffer for sample in group]
    assert [(sample.index, sample.response_length, sample.tokens) for sample in left] == [
        (0, 0, []), (1, 0, []), (6, 0, []), (7, 0, []),
    ]  # fmt: skip


def test_a_router_that_tells_engines_nothing_stops_the_run_and_says_why(worker, weights, fake_engine):
    def without_abort(payload):
        return weights._answer(payload) if "sampling_params" in payload else (404, {"error": "not forwarded"})

    rollouts = worker(url=fake_engine(without_abort).url, **FLAGS)
    weights.slow = seeds_of(rollouts, [0, 3])
    with pytest.raises(ServiceError, match=r"answered 404.*--partial-rollout needs a router that passes it on"):
        rollouts.generate(0, "1")


def test_a_request_that_is_sent_again_has_another_id(worker, weights, fake_engine):
    """SGLang refuses an id that it still has, and it may notice late that nobody waits for its answer any more."""
    lost = []

    def losing(payload):
        answer = weights._answer(payload)
        if "sampling_params" in payload and len(lost) < SIZE:
            lost.append(payload["rid"])
            return 503, {"error": "the connection to the engine broke"}
        return answer

    rollouts = worker(url=fake_engine(losing).url, **FLAGS)
    weights.slow = seeds_of(rollouts, [0, 3])
    batch = rollouts.generate(0, "1")["batch"]
    assert len(lost) == SIZE
    assert len(batch["group_indices"]) == TARGET * SIZE
