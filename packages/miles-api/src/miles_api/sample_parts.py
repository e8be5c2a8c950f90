"""What a `Sample` is made of besides plain values: its status and the counts of its generations."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

__all__ = ["PrefixCacheInfo", "SpecInfo", "Status"]


class Status(enum.StrEnum):
    """How far a sample has come."""

    PENDING = "pending"
    """Not generated yet, or re-queued."""
    COMPLETED = "completed"
    """The model finished: an end token or a stop string."""
    TRUNCATED = "truncated"
    """Cut at a length limit."""
    ABORTED = "aborted"
    """Interrupted from outside; its tokens so far are kept."""
    FAILED = "failed"
    """Generation gave up after errors."""


class SpecInfo(msgspec.Struct, kw_only=True):
    """Counts of speculative decoding, summed over the turns of a sample."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    @property
    def spec_accept_rate(self) -> float:
        """Accepted tokens for each drafted one; 0 before anything was drafted."""
        return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

    @property
    def spec_accept_length(self) -> float:
        """Tokens gained by each verification; 0 before the first."""
        return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        """Add the counts in an engine's `meta_info`; those that it lacks are 0."""
        self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
        self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
        self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
        self.completion_token_num += meta_info.get("completion_tokens", 0)


class PrefixCacheInfo(msgspec.Struct, kw_only=True):
    """How much of the prompts the engine found in its prefix cache, summed over the turns of a sample."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Cached tokens for each prompt token; 0 before the first request."""
        return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        """Add the counts in an engine's `meta_info`; those that it lacks are 0."""
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)
