"""Proof that an engine serves what the trainer holds: hashes of its tensors, and log-probs of given tokens."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.checksum import CHECKSUM
from miles_api.errors import ServiceError
from miles_train.weight_sync.engine import RefusedError, ask

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["Finding", "Reference", "as_metrics", "check_engine", "default_tolerance", "probe_tokens"]

_LENGTHS = (12, 12, 10, 8)
"""Short: an engine may be limited to few tokens, and one more, its answer, must fit too."""
_NOT_OFFERED = (404, 405, 501)
_NAMED_AT_MOST = 8
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")


class Reference(msgspec.Struct, frozen=True):
    """What the trainer says about the weights of one push."""

    version: str
    checksums: dict[str, str]
    """Hash of every tensor by its Hugging Face name."""
    tokens: list[list[int]]
    log_probs: list[list[float]]
    """For each sequence of `tokens`, those of its tokens after the first."""
    tolerance: float
    """Largest mean absolute gap of a sequence's log-probs, in nats."""


class Finding(msgspec.Struct, frozen=True):
    """What a check that passed has seen."""

    tensors: int
    """How many tensors were compared by hash; 0 for an engine that does not offer it."""
    gap_max: float
    """Largest absolute gap of a log-prob, in nats."""
    gap_mean: float


def probe_tokens(vocab_size: int) -> list[list[int]]:
    """Return the sequences that are scored: always the same for one size of vocabulary, no tokenizer needed.

    Without the last token: SGLang names 0 in its place when it reports the log-probs of a prompt.
    """
    draw = random.Random(0)
    return [[draw.randrange(max(vocab_size - 1, 1)) for _ in range(length)] for length in _LENGTHS]


def default_tolerance(dtype: str) -> float:
    """Return the tolerance for weights of this dtype, in nats."""
    return 1e-3 if dtype == "float32" else 0.5


def check_engine(endpoint: Endpoint, reference: Reference) -> Finding:
    """Compare what `endpoint` serves with `reference`.

    Raises:
        ServiceError: they differ; it names the engine and either the tensors or sequence, position and both values.
        EngineGoneError: the engine does not answer.
    """
    tensors = _compare_checksums(endpoint, reference)
    return _compare_log_probs(endpoint, reference, tensors)


def as_metrics(findings: list[Finding]) -> dict[str, float]:
    """Return the metrics of one checked push: engines, tensors of each that were compared, and gaps over all."""
    return {
        "sync/checked": float(len(findings)),
        "sync/checked_tensors": float(min(finding.tensors for finding in findings)),
        "sync/probe_gap_max": max(finding.gap_max for finding in findings),
        "sync/probe_gap_mean": max(finding.gap_mean for finding in findings),
    }


def _compare_checksums(endpoint: Endpoint, reference: Reference) -> int:
    """Return how many tensors were compared; 0 if nothing that the engine hashes is hashed so by the trainer."""
    try:
        answer = ask(endpoint, "/weights_checker", {"action": "checksum"})
    except RefusedError as error:
        if error.status in _NOT_OFFERED:
            return 0
        raise
    if not isinstance(answer, dict):
        return 0
    if answer.get("checksum_of") == CHECKSUM:
        wanted, found = reference.checksums, answer["checksums"]
    else:
        found = _sglang_checksums(endpoint, answer)
        wanted = {name: value for name, value in reference.checksums.items() if name in found}
        found = {name: found[name] for name in wanted}
    differing = {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]}
    # A tied output layer may be listed beside the embedding whose values it has.
    aliases = set(wanted.values())
    problems = {
        "of other values": [f"{name} ({wanted[name]} here, {found[name]} there)" for name in sorted(differing)],
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown to the trainer": sorted(n for n in found.keys() - wanted.keys() if found[n] not in aliases),
        "read, but not in use": sorted(answer.get("stale", [])),
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names)
        raise ServiceError(
            f"engine {endpoint.url} does not serve the weights {reference.version!r} that the trainer pushed. "
            f"Tensors {listed}"
        )
    return len(wanted)


def _sglang_checksums(endpoint: Endpoint, answer: dict[str, Any]) -> dict[str, str]:
    """Return those of SGLang's hashes that can be compared with ours; none of an engine on a GPU, or in parts.

    On a CPU SGLang takes the same digits of SHA-256 over the bytes that it has of a tensor: in float32 ours. It fuses
    q, k and v, and gate and up, under other names, and pads the vocabulary: of these the log-probs must tell.
    """
    ranks = answer.get("ranks")
    # Before 0.5.23 it has another form.
    if not isinstance(ranks, list) or len(ranks) != 1 or "checksums" not in ranks[0]:
        return {}
    info = ask(endpoint, "/server_info")
    if (info.get("device"), info.get("dtype")) != ("cpu", "float32"):
        return {}
    return {name: value for name, value in ranks[0]["checksums"].items() if name not in _PADDED}


def _compare_log_probs(endpoint: Endpoint, reference: Reference, tensors: int) -> Finding:
    body = {
        "input_ids": reference.tokens,
        # With a seed of its own the probe does not move the stream from which the engine seeds other requests.
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "sampling_seed": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = ask(endpoint, "/generate", body)
    if not isinstance(answers, list) or len(answers) != len(reference.tokens):
        raise ServiceError(f"engine {endpoint.url} gave no answer for each probe sequence: {str(answers)[:500]}")
    gaps = [
        _gaps(endpoint, answer, tokens, log_probs)
        for answer, tokens, log_probs in zip(answers, reference.tokens, reference.log_probs, strict=True)
    ]
    means = [sum(values) / len(values) for values in gaps]
    worst = means.index(max(means))
    if means[worst] > reference.tolerance:
        at = gaps[worst].index(max(gaps[worst]))
        theirs = _input_log_probs(answers[worst])[at][0]
        raise ServiceError(
            f"engine {endpoint.url} computes other log-probs with the weights {reference.version!r} than the trainer: "
            f"{means[worst]:.3g} nats apart in the mean of probe sequence {worst} {reference.tokens[worst]}, most at "
            f"position {at + 1}: {theirs} there, {reference.log_probs[worst][at]} here "
            f"(--weight-check-tolerance {reference.tolerance:g})"
        )
    every = [gap for values in gaps for gap in values]
    return Finding(tensors=tensors, gap_max=max(every), gap_mean=sum(every) / len(every))


def _gaps(endpoint: Endpoint, answer: Any, tokens: list[int], log_probs: list[float]) -> list[float]:
    entries = _input_log_probs(answer)
    if [entry[1] for entry in entries] != tokens[1:]:
        raise ServiceError(f"engine {endpoint.url} gave no log-probs for the tokens {tokens}: {str(answer)[:500]}")
    return [_gap(ours, entry[0]) for ours, entry in zip(log_probs, entries, strict=True)]


def _gap(ours: float, theirs: float | None) -> float:
    """Return the absolute difference; infinite for what is not a number, which JSON may hold as null."""
    gap = math.inf if theirs is None else abs(ours - theirs)
    return math.inf if math.isnan(gap) else gap


def _input_log_probs(answer: Any) -> list[Any]:
    """Return SGLang's `[log-prob, token id, text]` of the tokens after the first, which nothing predicts."""
    try:
        return answer["meta_info"]["input_token_logprobs"][1:]
    except (KeyError, TypeError):
        return []


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
