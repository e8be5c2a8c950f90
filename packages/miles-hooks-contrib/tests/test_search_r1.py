"""Conversations with a search engine, held with a scripted model and a scripted retriever."""

import asyncio

import pytest

from miles_api.errors import ConfigError, ServiceError
from miles_api.rollout_types import GenerateFnInput
from miles_api.sample import Status
from miles_api.testing import hook_args, make_prompt, make_sample
from miles_api.testing.tokenizer import ByteTokenizer
from miles_hooks_contrib.search_r1 import SearchR1
from miles_hooks_contrib.search_r1.retrieval import Document, Hit
from miles_hooks_contrib.search_r1.tags import CORRECTION

SEARCH, ANSWER = "<think>hm</think><search>moon</search>", "<think>so</think><answer>cheese</answer>"
SHOWN = "\n\n<information>Doc 1(Title: Moon) It is cheese.</information>\n\n"


class PairTokenizer(ByteTokenizer):
    """Bytes, but `>` and a line break together are one token, as in the vocabularies of real models."""

    PAIR = 900

    def decode(self, ids, skip_special_tokens=False, **options):
        return "".join(
            ">\n" if token == self.PAIR else super(PairTokenizer, self).decode([token], skip_special_tokens)
            for token in ids
        )


class Shelf:
    """A retriever that always has the same passages, and can fail or dawdle."""

    def __init__(self, *contents, error=None, hold=None):
        self.contents, self.error, self.hold = contents or ("Moon\nIt is cheese.",), error, hold
        self.queries, self.running, self.most, self.closed = [], 0, 0, False

    async def search(self, query, topk):
        self.queries.append((query, topk))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await (self.hold.wait() if self.hold else asyncio.sleep(0))
        finally:
            self.running -= 1
        if self.error:
            raise self.error
        return [Hit(Document(text), 1.0) for text in self.contents[:topk]]

    async def aclose(self):
        self.closed = True


class State:
    """The `GenerateState` of one rollout whose model says what the script says."""

    def __init__(self, args, script, tokenizer=None):
        self.args, self.script, self.tokenizer = args, list(script), tokenizer or ByteTokenizer()
        self.requests, self.aborted = [], False

    async def post(self, path, payload):
        self.requests.append((path, payload))
        said = self.script.pop(0)
        said = {"text": said} if isinstance(said, str) else said
        ids = said.get("ids") or self.tokenizer.encode(said["text"])
        limit = payload["sampling_params"]["max_new_tokens"]
        finish = said.get("finish", "stop")
        if len(ids) > limit:
            ids, finish = ids[:limit], "length"
        meta = {
            "finish_reason": {"type": finish}, "weight_version": "1",
            "prompt_tokens": said.get("saw", len(payload["input_ids"])),
            "output_token_logprobs": [[-0.5 - i / 100, token, None] for i, token in enumerate(ids)],
        }  # fmt: skip
        return {"text": "the text is not looked at", "output_ids": ids, "meta_info": meta}


def talk(script, shelf=None, *, limit=1000, tokenizer=None, count=1, before=None, **options):
    """Hold conversations by one script each; return their samples, the states and the retriever."""
    shelf = shelf or Shelf()
    args = hook_args(SearchR1, search_url="http://127.0.0.1:1/retrieve", **options)
    hook = SearchR1(args, shelf)
    states = [State(args, script, tokenizer) for _ in range(count)]
    samples = [before or make_prompt(prompt="Q: what is the moon?", index=i) for i in range(count)]

    async def main():
        params = [{"temperature": 1.0, "max_new_tokens": limit, "skip_special_tokens": True} for _ in states]
        inputs = [
            GenerateFnInput(state=state, sample=sample, sampling_params=its)
            for state, sample, its in zip(states, samples, params, strict=True)
        ]
        try:
            return [out.samples for out in await asyncio.gather(*map(hook, inputs))]
        finally:
            await hook.aclose()

    made = asyncio.run(main())
    for sample in made:
        sample.validate()
    return made, states, shelf


def one(script, shelf=None, **options):
    [sample], [state], shelf = talk(script, shelf, **options)
    return sample, state, shelf


def trained(sample):
    """The text of the tokens that the loss counts."""
    response = sample.tokens[len(sample.tokens) - sample.response_length :]
    return ByteTokenizer().decode([t for t, m in zip(response, sample.loss_mask, strict=True) if m])


def test_passages_are_shown_behind_a_search_and_left_out_of_the_loss():
    sample, _, shelf = one([SEARCH, ANSWER])
    assert sample.response == SEARCH + SHOWN + ANSWER
    assert trained(sample) == SEARCH + ANSWER
    assert shelf.queries == [("moon", 3)]
    assert sample.status is Status.COMPLETED
    assert sample.metadata["tool_calls"] == 1
    assert sample.metadata["turns"] == 2
    assert sample.metadata["observation_tokens"] == len(SHOWN.encode())
    masked = [p for p, m in zip(sample.rollout_log_probs, sample.loss_mask, strict=True) if not m]
    assert set(masked) == {0.0}
    assert len(masked) == len(SHOWN.encode())
    assert all(p < 0 for p, m in zip(sample.rollout_log_probs, sample.loss_mask, strict=True) if m)


def test_each_request_begins_with_all_ids_that_were_sent_and_answered_before():
    sample, state, _ = one([SEARCH, SEARCH, ANSWER])
    sent = [payload["input_ids"] for _, payload in state.requests]
    for before, said, after in zip(sent, [SEARCH, SEARCH, ANSWER], [*sent[1:], sample.tokens], strict=True):
        known = before + ByteTokenizer().encode(said)
        assert after[: len(known)] == known
    assert [payload["sampling_params"]["stop"] for _, payload in state.requests] == [["</search>", "</answer>"]] * 3
    assert len({payload["sampling_params"]["sampling_seed"] for _, payload in state.requests}) == 3


def test_a_closing_tag_inside_a_token_keeps_that_token_and_drops_what_an_engine_wrote_behind_it():
    tokenizer = PairTokenizer()
    start = tokenizer.encode(SEARCH[:-1])
    behind = tokenizer.encode("<information>I make it up</information>")
    sample, _, shelf = one(
        [{"ids": [*start, tokenizer.PAIR, *behind], "finish": "length"}, ANSWER], tokenizer=tokenizer
    )
    response = sample.tokens[len(sample.tokens) - sample.response_length :]
    assert response[: len(start) + 1] == [*start, tokenizer.PAIR]
    assert sample.response == SEARCH + "\n" + SHOWN + ANSWER
    assert shelf.queries == [("moon", 3)]


@pytest.mark.parametrize("said", ["I know it", "<search>  </search>", "<search>moon</answer>", "</search>", ""])
def test_a_turn_without_a_proper_action_is_answered_with_the_correction_of_the_paper(said):
    end = {"ids": [*ByteTokenizer().encode(said), ByteTokenizer.eos_token_id]}
    sample, _, shelf = one([end, ANSWER])
    assert sample.response.endswith(CORRECTION + ANSWER)
    assert not shelf.queries
    assert sample.metadata["malformed_tool_calls"] == 1
    assert CORRECTION not in trained(sample)


def test_the_end_of_text_that_a_model_writes_instead_of_an_action_stays_and_is_trained():
    ids = [*ByteTokenizer().encode("hm"), ByteTokenizer.eos_token_id]
    sample, _, _ = one([{"ids": ids}, ANSWER])
    assert sample.response == "hm" + CORRECTION + ANSWER
    response = sample.tokens[len(sample.tokens) - sample.response_length :]
    assert (response[:3], sample.loss_mask[:4]) == (ids, [1, 1, 1, 0])


def test_a_turn_that_used_up_its_own_share_is_corrected_and_one_that_used_up_the_response_is_cut_off():
    sample, _, _ = one(["x" * 80, ANSWER], search_turn_len=50)
    assert sample.response == "x" * 50 + CORRECTION + ANSWER
    assert sample.status is Status.COMPLETED
    sample, _, _ = one(["x" * 80], search_turn_len=50, limit=50)
    assert sample.response == "x" * 50
    assert sample.status is Status.TRUNCATED


def test_after_the_last_turn_with_a_result_the_model_speaks_once_more_and_searches_nothing():
    sample, _, shelf = one([SEARCH, SEARCH, SEARCH], search_max_turns=2)
    assert len(shelf.queries) == 2
    assert sample.metadata["turns"] == 3
    assert sample.status is Status.TRUNCATED
    assert sample.response.endswith("</search>")


def test_without_turns_for_results_nothing_is_searched():
    sample, _, shelf = one([ANSWER], search_max_turns=0)
    assert sample.response == ANSWER
    assert not shelf.queries


def test_passages_that_leave_no_room_to_go_on_end_the_conversation_before_they_are_shown():
    for room, shown in ((len(SEARCH) + len(SHOWN), ""), (len(SEARCH) + len(SHOWN) + 1, SHOWN + "<")):
        sample, _, _ = one([SEARCH, ANSWER], limit=room)
        assert sample.response == SEARCH + shown
        assert sample.status is Status.TRUNCATED


def test_the_context_bounds_prompt_and_response_together():
    prompt = len("Q: what is the moon?")
    sample, state, _ = one([SEARCH, ANSWER], rollout_max_context_len=prompt + len(SEARCH) + 5)
    assert len(sample.tokens) == prompt + len(SEARCH)
    assert state.requests[0][1]["sampling_params"]["max_new_tokens"] == len(SEARCH) + 5


def test_long_passages_are_cut_and_their_frame_stays_whole():
    sample, _, _ = one([SEARCH, ANSWER], Shelf("T\n" + "x" * 900), search_result_len=30)
    [shown] = sample.response.partition("<information>")[2].split("</information>")[:1]
    assert shown == "Doc 1(Title: T) " + "x" * 14


def test_a_retriever_that_fails_fails_the_sample_instead_of_finding_nothing():
    with pytest.raises(ServiceError, match="gone"):
        one([SEARCH, ANSWER], Shelf(error=ServiceError("gone")))


def test_a_search_past_its_deadline_fails_the_sample():
    shelf = Shelf(hold=asyncio.Event())
    with pytest.raises(ServiceError, match=r"'moon' had no reply within --search-timeout 0.02 s"):
        one([SEARCH, ANSWER], shelf, search_timeout=0.02)
    assert shelf.running == 0


def test_no_more_searches_run_at_once_than_allowed_and_waiting_costs_none_its_deadline():
    samples, _, shelf = talk([SEARCH, SEARCH, ANSWER], count=8, search_concurrency=2)
    assert shelf.most == 2
    assert len(shelf.queries) == 16
    assert all(sample.status is Status.COMPLETED for sample in samples)


def test_an_aborted_turn_keeps_what_there_is():
    sample, state, _ = one([SEARCH, {"text": "<thi", "finish": "abort"}])
    assert sample.status is Status.ABORTED
    assert sample.response == SEARCH + SHOWN + "<thi"
    assert len(state.requests) == 2


def test_a_conversation_that_was_begun_starts_anew():
    begun = make_sample(response="<think>half", prompt="Q: what is the moon?", status=Status.ABORTED)
    sample, _, _ = one([SEARCH, ANSWER], before=begun)
    assert sample.response == SEARCH + SHOWN + ANSWER


def test_an_engine_that_saw_other_tokens_is_refused():
    with pytest.raises(ServiceError, match="the engine saw a prompt of 3 tokens, and 20 were sent"):
        one([{"text": ANSWER, "saw": 3}])


def test_chat_messages_go_through_the_chat_template():
    messages = [{"role": "user", "content": "what is the moon?"}]
    sample, _, _ = one([ANSWER], before=make_prompt(prompt=messages))
    prompt = sample.tokens[: len(sample.tokens) - sample.response_length]
    assert ByteTokenizer().decode(prompt) == "user: what is the moon?\nassistant: "


def test_somewhere_to_search_is_needed_and_only_one_place():
    for places in ({}, {"search_corpus": "a.jsonl", "search_url": "http://here/retrieve"}):
        with pytest.raises(ConfigError, match="pass --search-corpus FILE"):
            hook_args(SearchR1, **places)
