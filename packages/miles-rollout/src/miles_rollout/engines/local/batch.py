"""The running batch: one row per job, rows 0 … n-1 always in use, state held in tensors between steps.

Python sees a job's tokens when it finishes (or each step, if it is watched): the hot path handles tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles_rollout.engines.local.sampler import SamplingRows, Truncation, sample, uniforms

if TYPE_CHECKING:
    from miles_rollout.engines.local.jobs import Job
    from miles_rollout.engines.local.kv import KVPool

__all__ = ["RunningBatch"]

_TOKEN, _POSITION, _FIRST, _LAST, _SEED, _TOP_K, _STOPS = range(7)
_INT_COLUMNS = 6
_TEMPERATURE, _TOP_P, _MIN_P = range(3)
_UNIFORM_STEPS = 16
"""Random numbers are hashed for so many steps at once: the cost is in the number of operations."""


class RunningBatch:
    """Rows of jobs being decoded. `jobs[i]` owns row i of every tensor and of the `KVPool`."""

    def __init__(self, pool: KVPool, vocab_size: int, *, exact: bool = False) -> None:
        self.pool, self.vocab_size, self.exact = pool, vocab_size, exact
        self.jobs: list[Job] = []
        self.longest = 0
        """Length of the longest row, the token about to be run included."""
        self._ints = torch.zeros(_INT_COLUMNS + 1, 0, dtype=torch.int64)
        self._floats = torch.zeros(3, 0)
        self._tokens = torch.zeros(0, 16, dtype=torch.int64)
        self._logprobs = torch.zeros(0, 16)
        self._rows: SamplingRows | None = None
        self._uniform_steps: list[torch.Tensor] = []
        self._watched = self._minimal = 0

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def tokens(self) -> torch.Tensor:
        """The last token of each row, not yet run."""
        return self._ints[_TOKEN, : len(self.jobs)]

    @property
    def positions(self) -> torch.Tensor:
        """The position of each row's last token."""
        return self._ints[_POSITION, : len(self.jobs)]

    def add(self, jobs: list[Job]) -> int:
        """Append rows for freshly prefilled jobs; return the first new row."""
        start, count = len(self.jobs), len(jobs)
        self._reserve(start + count, max(len(job.stop_ids) for job in jobs))
        stops = self._ints.shape[0] - _INT_COLUMNS
        ints, floats = [], []
        for job in jobs:
            length = len(job.ids) + len(job.output_ids)
            last = len(job.ids) + job.max_new_tokens - 1
            top_k = job.top_k if 0 < job.top_k < self.vocab_size else self.vocab_size
            padding = (-1,) * (stops - len(job.stop_ids))
            ints.append((0, length - 1, length, last, job.seed, top_k, *job.stop_ids, *padding))
            floats.append((job.temperature, job.top_p, job.min_p))
        self._ints[:, start : start + count] = torch.tensor(ints, dtype=torch.int64).t()
        self._floats[:, start : start + count] = torch.tensor(floats).t()
        self.jobs.extend(jobs)
        self._composition_changed()
        return start

    def emit(self, logits: torch.Tensor, start: int) -> tuple[list[int], list[int]]:
        """Draw the next token of rows `start` and up.

        Returns the rows that end here (a stop token, their limit, or broken), and those whose logits are not finite.
        """
        rows = slice(start, len(self.jobs))
        ints = self._ints[:, rows]
        positions = ints[_POSITION].add_(1)
        self._forbid_early_stops(logits, start)
        tokens, logprobs = sample(logits, self._sampling_rows(start), self._uniforms(start), exact=self.exact)
        ints[_TOKEN] = tokens
        columns = positions - ints[_FIRST]
        self.longest = max(self.longest, int(positions.max()) + 1)
        width = int(columns.max()) + 1
        if width > self._tokens.shape[1]:
            self._widen(width)
        place = torch.arange(start, len(self.jobs)).mul_(self._tokens.shape[1]).add_(columns)
        self._tokens.view(-1).index_copy_(0, place, tokens)
        self._logprobs.view(-1).index_copy_(0, place, logprobs)
        done = (ints[_STOPS:] == tokens).any(0).logical_or_(positions >= ints[_LAST])
        finite = logprobs.isfinite()
        broken: list[int] = []
        if not finite.all():
            done |= ~finite
            broken = ((~finite).nonzero().flatten() + start).tolist()
        return (done.nonzero().flatten() + start).tolist(), broken

    def collect(self, rows: list[int]) -> None:
        """Append to the jobs of `rows` what they drew since they joined (watched ones have it already)."""
        rows = [row for row in rows if not self.jobs[row].watched]
        if not rows:
            return
        index = torch.tensor(rows)
        counts = (self._ints[_POSITION, index] - self._ints[_FIRST, index] + 1).tolist()
        width = max(counts)
        tokens = self._tokens[index, :width].tolist()
        logprobs = self._logprobs[index, :width].tolist()
        for row, count, row_tokens, row_logprobs in zip(rows, counts, tokens, logprobs, strict=True):
            self.jobs[row].output_ids += row_tokens[:count]
            self.jobs[row].logprobs += row_logprobs[:count]

    def collect_watched(self, start: int) -> list[int]:
        """Append the last token to each watched job from row `start`; return their rows."""
        if not self._watched:
            return []
        rows = [row for row in range(start, len(self.jobs)) if self.jobs[row].watched]
        if rows:
            index = torch.tensor(rows)
            columns = self._ints[_POSITION, index] - self._ints[_FIRST, index]
            tokens = self._tokens[index, columns].tolist()
            logprobs = self._logprobs[index, columns].tolist()
            for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
                self.jobs[row].output_ids.append(token)
                self.jobs[row].logprobs.append(logprob)
        return rows

    def remove(self, rows: list[int]) -> None:
        """Free rows; the last rows move into the holes."""
        gone = set(rows)
        left = len(self.jobs) - len(gone)
        holes = sorted(row for row in gone if row < left)
        movers = [row for row in range(left, len(self.jobs)) if row not in gone]
        if holes:
            to, source = torch.tensor(holes), torch.tensor(movers)
            for tensor in (self._ints, self._floats):
                tensor.index_copy_(1, to, tensor.index_select(1, source))
            for tensor in (self._tokens, self._logprobs):
                tensor.index_copy_(0, to, tensor.index_select(0, source))
            self.pool.move(to, source, int(self._ints[_POSITION, to].max()))
            for hole, mover in zip(holes, movers, strict=True):
                self.jobs[hole] = self.jobs[mover]
        del self.jobs[left:]
        self._composition_changed()
        self.longest = int(self.positions.max()) + 1 if left else 0

    def _uniforms(self, start: int) -> torch.Tensor:
        """Return the numbers for the positions about to be drawn; every row moves on by one each step."""
        if start == 0 and self._uniform_steps:
            return self._uniform_steps.pop()
        ints = self._ints[:, start : len(self.jobs)]
        if start:
            return uniforms(ints[_SEED], ints[_POSITION])
        steps = torch.arange(_UNIFORM_STEPS)[:, None]
        self._uniform_steps = list(uniforms(ints[_SEED], ints[_POSITION] + steps).flip(0))
        return self._uniform_steps.pop()

    def _composition_changed(self) -> None:
        self._rows = None
        self._uniform_steps = []
        self._watched = sum(job.watched for job in self.jobs)
        self._minimal = sum(job.min_new_tokens > 0 for job in self.jobs)

    def drawn(self, row: int) -> int:
        """Return how many tokens the row's job has drawn in all, those before it joined included."""
        return int(self._ints[_POSITION, row]) + 1 - len(self.jobs[row].ids)

    def _sampling_rows(self, start: int) -> SamplingRows:
        if start == 0 and self._rows is not None:
            return self._rows
        ints, floats = self._ints[:, start : len(self.jobs)], self._floats[:, start : len(self.jobs)]
        greedy = floats[_TEMPERATURE] == 0
        temperature = floats[_TEMPERATURE].masked_fill(greedy, 1.0)
        truncated = (ints[_TOP_K] < self.vocab_size) | (floats[_TOP_P] < 1) | (floats[_MIN_P] > 0)
        rows = SamplingRows(
            temperature=temperature,
            greedy=greedy,
            top_p=floats[_TOP_P],
            min_p=floats[_MIN_P],
            any_scaled=bool((temperature != 1).any()),
            any_greedy=bool(greedy.any()),
            all_greedy=bool(greedy.all()),
            truncated=_truncations(ints[_TOP_K], truncated, greedy),
        )
        if start == 0:
            self._rows = rows
        return rows

    def _forbid_early_stops(self, logits: torch.Tensor, start: int) -> None:
        for row in range(start, len(self.jobs) if self._minimal else start):
            job = self.jobs[row]
            if job.min_new_tokens and job.stop_ids and self.drawn(row) <= job.min_new_tokens:
                logits[row - start, list(job.stop_ids)] = float("-inf")

    def _reserve(self, rows: int, stops: int) -> None:
        stops = max(stops, self._ints.shape[0] - _INT_COLUMNS)
        capacity = self._ints.shape[1]
        if rows > capacity or stops > self._ints.shape[0] - _INT_COLUMNS:
            grown = max(rows, 2 * capacity) if rows > capacity else capacity
            ints = torch.full((_INT_COLUMNS + stops, grown), -1, dtype=torch.int64)
            ints[: self._ints.shape[0], :capacity] = self._ints
            self._ints = ints
            self._floats = _grown(self._floats, (3, grown))
            self._tokens = _grown(self._tokens, (grown, self._tokens.shape[1]))
            self._logprobs = _grown(self._logprobs, (grown, self._logprobs.shape[1]))

    def _widen(self, width: int) -> None:
        shape = (self._tokens.shape[0], max(width, 2 * self._tokens.shape[1]))
        self._tokens, self._logprobs = _grown(self._tokens, shape), _grown(self._logprobs, shape)


def _truncations(top_k: torch.Tensor, truncated: torch.Tensor, greedy: torch.Tensor) -> list[Truncation]:
    """Sort the rows that do not draw from all tokens by their top-k; greedy rows may go with any others."""
    drawn = truncated & ~greedy
    if not drawn.any():
        return []
    widths = top_k[drawn].unique().tolist()
    if len(widths) == 1 and bool((truncated | greedy).all()):
        return [Truncation(None, widths[0])]
    return [Truncation((drawn & (top_k == width)).nonzero().flatten(), width) for width in widths]


def _grown(old: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    new = torch.zeros(shape, dtype=old.dtype)
    new[: old.shape[0], : old.shape[1]] = old
    return new
