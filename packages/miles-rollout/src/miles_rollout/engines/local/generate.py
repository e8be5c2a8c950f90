"""Requests to jobs, and finished jobs to replies."""

from __future__ import annotations

import time
import uuid
from itertools import count, repeat
from typing import TYPE_CHECKING, Any

import msgspec

from miles_rollout.engines.local.errors import RequestError
from miles_rollout.engines.local.jobs import Job
from miles_rollout.engines.local.support import check_request, check_sampling, stop_strings
from miles_rollout.engines.protocol import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerateRequest,
    MetaInfo,
    Reply,
    SamplingParams,
)

if TYPE_CHECKING:
    from miles_rollout.engines.local.tokenizer import TextCodec

__all__ = ["JobFactory", "decode_finished", "encode_reply", "make_reply"]

_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that the stream of seeds does not repeat."""
_MASK = (1 << 63) - 1


class JobFactory:
    """Turns requests into jobs for one model; requests without a seed get one from the engine's own stream.

    With `deterministic` they are refused unless greedy: what they drew would depend on who came before.
    """

    def __init__(
        self, codec: TextCodec, vocab_size: int, max_total_len: int, seed: int, *, deterministic: bool = False
    ) -> None:
        self.codec, self.vocab_size, self.max_total_len = codec, vocab_size, max_total_len
        self._deterministic = deterministic
        self._names = map(f"{uuid.uuid4().hex[:12]}-{{}}".format, count())
        self._seed = (seed * 0xD1342543DE82EF95 + 1) & _MASK

    def expand(self, request: GenerateRequest) -> tuple[list[Job], bool]:
        """Return the jobs in reply order, and whether the reply is a list.

        Raises:
            RequestError: something asked for is out of range, too long or not supported.
        """
        check_request(request)
        prompts, batched = self._prompts(request)
        params = _per_prompt(request.sampling_params, len(prompts), "sampling_params")
        starts = _per_prompt(request.logprob_start_len, len(prompts), "logprob_start_len")
        wanted = _per_prompt(request.return_logprob, len(prompts), "return_logprob")
        rids = self._rids(request.rid, len(prompts), batched)
        jobs: list[Job] = []
        for ids, sampling, start, logprob, rid in zip(prompts, params, starts, wanted, rids, strict=True):
            template = self._job(ids, sampling, rid)
            template.stream = request.stream
            template.return_logprob = logprob
            template.prompt_logprob_start = self._start(start, ids) if logprob else -1
            jobs += [template] if sampling.n == 1 else self._copies(template, sampling)
        return jobs, batched or any(sampling.n > 1 for sampling in params)

    def _prompts(self, request: GenerateRequest) -> tuple[list[list[int]], bool]:
        prompts: list[Any]
        if request.text is not None:
            many = isinstance(request.text, list)
            texts = request.text if isinstance(request.text, list) else [request.text]
            prompts = [self.codec.encode(text) for text in texts]
        else:
            given = request.input_ids or []
            many = bool(given) and isinstance(given[0], list)
            prompts = given if many else [given]
        if not prompts:
            raise RequestError("the list of prompts is empty")
        return [self._checked_ids(ids) for ids in prompts], many

    def _checked_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not ids:
            raise RequestError("a prompt has no tokens, or input_ids mixes numbers and lists")
        try:
            low, high = min(ids), max(ids)
            outside = low < 0 or high >= self.vocab_size
        except TypeError:
            raise RequestError("input_ids mixes numbers and lists") from None
        if outside:
            raise RequestError(f"input_ids must be in [0, {self.vocab_size}); found {low if low < 0 else high}")
        if len(ids) >= self.max_total_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the engine's longest prompt plus response is "
                f"{self.max_total_len} (--max-total-len)"
            )
        return ids

    def _job(self, ids: list[int], sampling: SamplingParams, rid: str) -> Job:
        check_sampling(sampling)
        room = self.max_total_len - len(ids)
        limit = sampling.max_new_tokens
        if limit is None:
            limit = min(DEFAULT_MAX_NEW_TOKENS, room)
        if limit > room:
            raise RequestError(
                f"{len(ids)} prompt tokens and max_new_tokens={limit} make {len(ids) + limit}; the engine's longest "
                f"prompt plus response is {self.max_total_len} (--max-total-len)"
            )
        stop_ids = () if sampling.ignore_eos else self.codec.eos_ids
        if sampling.stop_token_ids and not sampling.ignore_eos:
            stop_ids = tuple(dict.fromkeys((*stop_ids, *sampling.stop_token_ids)))
        return Job(
            rid=rid,
            ids=ids,
            max_new_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=self._seed_of(sampling),
            min_new_tokens=sampling.min_new_tokens,
            stop_ids=tuple(i for i in stop_ids if 0 <= i < self.vocab_size),
            stop_strings=stop_strings(sampling),
            skip_special_tokens=sampling.skip_special_tokens,
            no_stop_trim=sampling.no_stop_trim,
        )

    def _copies(self, template: Job, sampling: SamplingParams) -> list[Job]:
        shared = {name: getattr(template, name) for name in _COPIED}
        seeds = [(template.seed + i) & _MASK for i in range(sampling.n)]
        return [Job(rid=f"{template.rid}_{i}", seed=seed, **shared) for i, seed in enumerate(seeds)]

    def _seed_of(self, sampling: SamplingParams) -> int:
        if sampling.sampling_seed is not None:
            return sampling.sampling_seed & _MASK
        if self._deterministic and sampling.temperature > 0:
            raise RequestError(
                "a deterministic engine needs a sampling_seed with each request that is not greedy: see "
                "miles_rollout.generate.turn.sampling_seed"
            )
        self._seed = (self._seed + _SEED_STRIDE) & _MASK
        return self._seed

    def _start(self, start: int, ids: list[int]) -> int:
        if not -1 <= start < len(ids):
            raise RequestError(f"logprob_start_len={start} must be -1 or a position of the prompt (0 … {len(ids) - 1})")
        return start

    def _rids(self, rid: str | list[str] | None, prompts: int, batched: bool) -> list[str]:
        if rid is None:
            return [next(self._names) for _ in range(prompts)]
        if isinstance(rid, list):
            return _per_prompt(rid, prompts, "rid")
        return [f"{rid}_{i}" for i in range(prompts)] if batched else [rid]


_COPIED = (
    *("ids", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "min_new_tokens", "stop_ids", "stop_strings"),
    *("skip_special_tokens", "no_stop_trim", "return_logprob", "prompt_logprob_start", "stream"),
)


def _per_prompt(value: object, count: int, name: str) -> list:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts")
    return value


def decode_finished(codec: TextCodec, jobs: list[Job]) -> None:
    """Set `text` of finished jobs, in as few calls of the tokenizer as there are ways to decode."""
    for skip in (True, False):
        chosen = [job for job in jobs if job.skip_special_tokens is skip]
        if chosen:
            texts = codec.decode_many([_text_ids(job) for job in chosen], skip)
            for job, text in zip(chosen, texts, strict=True):
                job.text = _trim(job, text)


def _text_ids(job: Job) -> list[int]:
    matched = job.finish.matched if job.finish else None
    return job.output_ids[:-1] if isinstance(matched, int) and not job.no_stop_trim else job.output_ids


def _trim(job: Job, text: str) -> str:
    matched = job.finish.matched if job.finish else None
    if isinstance(matched, str) and not job.no_stop_trim and (at := text.find(matched)) >= 0:
        return text[:at]
    return text


def make_reply(
    job: Job,
    weight_version: str,
    *,
    text: str | None = None,
    with_texts: TextCodec | None = None,
    index: int | None = None,
) -> Reply:
    """Build the reply of a finished job, or, given the `text` that may be shown, of a streaming one so far.

    With `with_texts` each log-prob entry holds its token's text. `weight_version` is the engine's current one.
    """
    final = text is None
    ids = job.output_ids if final else job.output_ids[: len(job.logprobs)]
    meta = MetaInfo(
        id=job.rid,
        finish_reason=job.finish if final else None,
        prompt_tokens=len(job.ids),
        completion_tokens=len(ids),
        cached_tokens=job.cached_tokens,
        weight_version=job.versions[-1][1] if job.versions else weight_version,
        weight_versions=job.version_spans(len(ids)),
        e2e_latency=(job.finished if final else time.perf_counter()) - job.started,
    )
    if job.return_logprob:
        meta.output_token_logprobs = _entries(job.logprobs, ids, with_texts)
        start = job.prompt_logprob_start
        prompt_ids = job.ids[start:] if start >= 0 and job.prompt_logprobs else []
        meta.input_token_logprobs = _entries(job.prompt_logprobs, prompt_ids, with_texts)
    reply = Reply(text=job.text if final else text, output_ids=ids, meta_info=meta)
    if index is not None:
        reply.index = index
    return reply


def _entries(logprobs: list, ids: list[int], codec: TextCodec | None) -> list[tuple]:
    texts = repeat(None) if codec is None else codec.decode_many([[i] for i in ids], skip_special_tokens=False)
    return list(zip(logprobs, ids, texts, strict=False))


def encode_reply(replies: list[Reply], as_list: bool) -> bytes:
    """Encode the body of a finished request."""
    return msgspec.json.encode(replies if as_list else replies[0])
