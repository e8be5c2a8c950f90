"""Continuous batching: jobs join between decode steps, finished rows are reused. One thread calls everything here."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from miles_rollout.engines.local.batch import RunningBatch
from miles_rollout.engines.local.errors import RequestError
from miles_rollout.engines.local.jobs import Job, News
from miles_rollout.engines.local.kv import KVPool, Prefill, PromptCache
from miles_rollout.engines.protocol import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_rollout.engines.local.model import SlotModel
    from miles_rollout.engines.local.tokenizer import TextCodec

__all__ = ["Limits", "Scheduler"]

_PREFILL_TOKENS = 4096
"""Padded tokens computed in one prefill."""


class Limits:
    """What the scheduler may use.

    `kv_bytes` bounds the keys and values of running rows; a single job is always admitted.
    """

    def __init__(self, max_running: int = 256, kv_bytes: int = 4 << 30, cache_bytes: int = 256 << 20) -> None:
        self.max_running, self.kv_bytes, self.cache_bytes = max_running, kv_bytes, cache_bytes


class Scheduler:
    """Waiting and running jobs of one model. `step` returns what changed."""

    def __init__(self, model: SlotModel, codec: TextCodec, limits: Limits) -> None:
        self.model, self.codec, self.limits = model, codec, limits
        self.paused = False
        self.released = False
        """Without its memory nothing can be computed: jobs wait."""
        self.awaits_weights = False
        """A replacement engine holds its requests back until it has been given the current weights."""
        self.weight_version = "default"
        self.waiting: deque[Job] = deque()
        self.pool = KVPool(model.layout, limits.max_running, model.max_positions)
        self.batch = RunningBatch(self.pool, model.vocab_size, exact=model.deterministic)
        self.cache = PromptCache(limits.cache_bytes)
        self._room_limit = max(1, limits.kv_bytes // max(1, self.pool.bytes_per_token))

    @property
    def busy(self) -> bool:
        """Whether any job waits or runs."""
        return bool(self.waiting or self.batch.jobs)

    @property
    def runs(self) -> bool:
        """Whether the next step computes anything."""
        return self.busy and not (self.paused or self.released)

    def add(self, job: Job) -> None:
        """Queue a job; it joins at the next step that has room."""
        self.waiting.append(job)

    def step(self) -> News:
        """Admit what fits and decode one token for every running job."""
        news = News()
        if not self.runs:
            return news
        if self.waiting and len(self.batch) < self.limits.max_running:
            self._admit(news)
        if self.batch.jobs:
            batch = self.batch
            self.pool.ensure(len(batch), batch.longest, len(batch))
            logits = self.model.decode(batch.tokens, batch.positions, self.pool, batch.longest)
            self._emit(logits, 0, news)
        return news

    # Control: all between two steps.

    def abort(self, chosen: Callable[[Job], bool]) -> list[Job]:
        """End the chosen jobs at once with what they have drawn; return them."""
        rows = [row for row, job in enumerate(self.batch.jobs) if chosen(job)]
        gone = [job for job in self.waiting if chosen(job)]
        if gone:
            self.waiting = deque(job for job in self.waiting if not chosen(job))
        self.batch.collect(rows)
        gone += [self.batch.jobs[row] for row in rows]
        self.batch.remove(rows)
        for job in gone:
            job.end(FinishReason(type="abort", message="Aborted", status_code=None, err_type=None))
        return gone

    def pause(self, mode: str) -> list[Job]:
        """Stop stepping. `abort` ends all jobs and returns them; `retract` drops their keys and values, so that they
        are computed anew; `in_place` keeps everything.

        Raises:
            RequestError: `retract` of running jobs of a deterministic model, which rounds a prompt otherwise than what
                it drew.
        """
        if mode == "retract" and self.model.deterministic and self.batch.jobs:
            raise RequestError("a deterministic engine does not retract requests: pause with abort or in_place")
        self.paused = True
        if mode == "abort":
            return self.abort(lambda _: True)
        if mode == "retract":
            rows = list(range(len(self.batch)))
            self.batch.collect(rows)
            self.waiting.extendleft(reversed(self.batch.jobs))
            self.batch.remove(rows)
            self._forget()
        return []

    def resume(self) -> None:
        """Step again."""
        self.paused = self.awaits_weights = False

    def await_weights(self) -> None:
        """Pause until `weights_arrived` or `resume`."""
        self.paused = self.awaits_weights = True

    def weights_arrived(self) -> None:
        """End the pause of `await_weights`; any other stays."""
        if self.awaits_weights:
            self.resume()

    def flush(self) -> bool:
        """Drop cached prompts and idle memory; False if any job is there."""
        if self.busy:
            return False
        self._forget()
        return True

    def set_version(self, version: str) -> None:
        """Name the weights; running jobs note where the new name begins."""
        for row, job in enumerate(self.batch.jobs):
            job.note_version(self.batch.drawn(row), version)
        self.weight_version = version

    def swap_weights(self, commit: Callable[[], None], version: str | None) -> None:
        """Put staged weights in place. Running jobs go on with the keys and values they have."""
        commit()
        self._forget()
        if version is not None:
            self.set_version(version)

    def _forget(self) -> None:
        self.cache.clear()
        if not self.batch.jobs:
            self.pool.release()

    # Admission.

    def _admit(self, news: News) -> None:
        taken = self._take()
        if not taken:
            return
        homes = self._prefilled(taken)
        by_prefill: dict[int, list[tuple[Job, int]]] = {}
        prefills: dict[int, Prefill] = {}
        for job, (prefill, row) in zip(taken, homes, strict=True):
            prefills[id(prefill)] = prefill
            by_prefill.setdefault(id(prefill), []).append((job, row))
        for which, members in by_prefill.items():
            self._join(prefills[which], [job for job, _ in members], torch.tensor([row for _, row in members]), news)

    def _take(self) -> list[Job]:
        """Pop waiting jobs while rows and memory last; all rows are as long as the longest job may get."""
        taken: list[Job] = []
        need = max((len(job.ids) + job.max_new_tokens for job in self.batch.jobs), default=0)
        while self.waiting and len(self.batch) + len(taken) < self.limits.max_running:
            job = self.waiting[0]
            longest = max(need, len(job.ids) + job.max_new_tokens)
            count = len(self.batch) + len(taken) + 1
            if count > 1 and count * longest > self._room_limit:
                break
            need = longest
            taken.append(self.waiting.popleft())
        return taken

    def _prefilled(self, jobs: list[Job]) -> list[tuple[Prefill, int]]:
        """Return where each job's prompt is held, computing each distinct missing prompt once."""
        homes: dict[bytes, tuple[Prefill, int]] = {}
        missing: dict[bytes, Job] = {}
        keys = [job.key() for job in jobs]
        for job, key in zip(jobs, keys, strict=True):
            if key in homes or key in missing:
                continue
            held = self.cache.get(key)
            if held is None:
                missing[key] = job
            else:
                homes[key] = held
        first = {id(job) for job in missing.values()}
        for chunk in _chunks(sorted(missing.items(), key=lambda item: len(item[0]))):
            prefill = self._run_prefill([job for _, job in chunk])
            self.cache.add([key for key, _ in chunk], prefill)
            homes.update((key, (prefill, row)) for row, (key, _) in enumerate(chunk))
        for job in jobs:
            # As in SGLang the last token always counts as computed.
            job.cached_tokens = 0 if id(job) in first else len(job.ids) - 1
            if job.prompt_logprob_start >= 0 and not job.prompt_logprobs:
                scores = self.model.score(torch.tensor(job.ids), job.prompt_logprob_start).tolist()
                job.prompt_logprobs = [None, *scores]
        return [homes[key] for key in keys]

    def _run_prefill(self, jobs: list[Job]) -> Prefill:
        prompts = [job.all_ids for job in jobs]
        lengths = [len(ids) for ids in prompts]
        width = max(lengths)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts])
        return self.model.prefill(tokens, torch.tensor(lengths))

    def _join(self, prefill: Prefill, jobs: list[Job], index: torch.Tensor, news: News) -> None:
        used = len(self.batch)
        longest = max(self.batch.longest, *(len(job.ids) + len(job.output_ids) + 1 for job in jobs), 0)
        self.pool.ensure(used + len(jobs), longest, used)
        self.pool.put(used, prefill, index)
        for job in jobs:
            job.note_version(len(job.output_ids), self.weight_version)
        start = self.batch.add(jobs)
        self._emit(prefill.logits.index_select(0, index), start, news)

    # After each forward.

    def _emit(self, logits: torch.Tensor, start: int, news: News) -> None:
        batch = self.batch
        done, broken = batch.emit(logits, start)
        reasons: dict[int, str] = {}
        for row in batch.collect_watched(start):
            job = batch.jobs[row]
            if job.stop_strings and (matched := self._stop_string(job)) is not None:
                reasons[row] = matched
            elif job.stream and row not in done:
                news.progressed[job] = None
        if reasons:
            done = sorted({*done, *reasons})
        if not done:
            return
        batch.collect(done)
        for row in done:
            job = batch.jobs[row]
            if row in broken:
                job.error = FloatingPointError("the model's logits are not finite: its weights are broken")
            job.end(_finish_reason(job, reasons.get(row)))
            news.finished.append(job)
        batch.remove(done)

    def _stop_string(self, job: Job) -> str | None:
        """Return the stop string that the last token completed; only the tail that can hold one is decoded."""
        tail = max(len(stop.encode()) for stop in job.stop_strings) + 1
        text = self.codec.decode(job.output_ids[-tail:], skip_special_tokens=False)
        return next((stop for stop in job.stop_strings if stop in text), None)


def _finish_reason(job: Job, matched: str | None) -> FinishReason:
    last = job.output_ids[-1]
    if last in job.stop_ids:
        return FinishReason(type="stop", matched=last)
    if matched is not None:
        return FinishReason(type="stop", matched=matched)
    return FinishReason(type="length", length=job.max_new_tokens)


def _chunks(items: list[tuple[bytes, Job]]) -> list[list[tuple[bytes, Job]]]:
    """Cut jobs sorted by length into prefills of bounded padded size, none padded beyond twice its shortest."""
    chunks: list[list[tuple[bytes, Job]]] = []
    for item in items:
        width = len(item[1].ids) + len(item[1].output_ids)
        if chunks:
            shortest = len(chunks[-1][0][1].all_ids)
            if (len(chunks[-1]) + 1) * width <= _PREFILL_TOKENS and width <= 2 * shortest + 16:
                chunks[-1].append(item)
                continue
        chunks.append([item])
    return chunks
