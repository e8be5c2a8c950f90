"""What can be set about conversations with a search engine, and about what they earn."""

from __future__ import annotations

from typing import Annotated

import msgspec

from miles_api.options import UserPath

__all__ = ["SearchOptions", "SearchRewardOptions"]

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
_Secret = Annotated[str, msgspec.Meta(min_length=1, extra={"secret": True})]


class SearchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The generate hook `search_r1`: where it searches, and how far a conversation may go."""

    search_corpus: UserPath | None = None
    """JSONL file of passages to search with BM25, in the rollout process; each line has `contents`, or `text` and
    perhaps `title`, and perhaps `id`. Needs `pip install "miles-hooks-contrib[search]"`."""
    search_url: str | None = None
    """Address of a retrieval server, such as `http://127.0.0.1:8000/retrieve`, in place of --search-corpus."""
    search_token: _Secret | None = None
    """Bearer token for --search-url."""
    search_topk: _Positive = 3
    """Passages that one search shows."""
    search_max_turns: Annotated[int, msgspec.Meta(ge=0)] = 4
    """Most turns that are answered with passages or a correction; after them the model speaks once more."""
    search_turn_len: _Positive | None = 500
    """Most tokens of one turn; a turn cut off there is corrected like any other that neither searches nor answers."""
    search_result_len: _Positive = 500
    """Most tokens of the passages that one search shows; what is over is cut off."""
    search_concurrency: _Positive = 64
    """Searches at the same time, over all conversations."""
    search_timeout: _Seconds = 30.0
    """Seconds that one search may take, all its attempts together; past it the sample fails. Waiting for one of
    --search-concurrency is not counted."""

    def __post_init__(self) -> None:
        """Refuse to have nowhere to search, or two places."""
        if (self.search_corpus is None) == (self.search_url is None):
            raise ValueError("pass --search-corpus FILE.jsonl, or --search-url for a retrieval server; one of them")


class SearchRewardOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The reward hook `search_r1`. The defaults are the paper's: exact match alone."""

    search_format_score: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What the right form is worth: added to a wrong answer in it, taken from a right answer that lacks it."""
    search_retrieval_score: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Added to a wrong answer of the right form if a passage that the model was shown contains a right one."""
    search_answer_score: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """What a wrong answer without the right form is worth; no answer at all is worth 0."""
