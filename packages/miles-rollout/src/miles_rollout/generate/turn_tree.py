"""The conversations of one session as a tree: each node is an answer, with what was said before it.

A request that repeats a recorded path and adds to it continues there, one that does not is a branch. Each leaf, with
the path to it, becomes a sample.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING, Any

from miles_rollout.generate.message_matching import same, similar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.sample import Status
    from miles_rollout.generate.chat import Messages, Seen
    from miles_rollout.generate.turn import Answer

__all__ = ["Turn", "TurnTree"]


class Turn:
    """One answer of the model, or a request for one under way."""

    def __init__(
        self,
        parent: Turn | None,
        said: Messages,
        shown: list[int],
        tools: list[dict[str, Any]],
        seen: Seen | None = None,
    ) -> None:
        self.parent = parent
        self.said = said
        """The messages that its request added to its parent's."""
        self.shown = shown
        """The ids between the parent's answer and this one; the prompt's without a parent."""
        self.tools = tools
        self.seen = seen
        """How the template rendered what `shown` is taken from."""
        self.start = (parent.end if parent else 0) + len(shown)
        """How many ids there are before the answer."""
        self.prompt_length: int = parent.prompt_length if parent else len(shown)
        """How many of them are the prompt's, before the first answer."""
        self.number = self.attempt = 0
        """The order of the requests, and which of those for the same ids it is."""
        self.key = b""
        """A digest of all that the model is given, and of the attempt."""
        self.names: tuple[str, ...] = ()
        """How the client knows the answer: `<completion id>/<choice>` and the completion's id."""
        self.answer: Answer | None = None
        self.message: dict[str, Any] = {}
        """The answer as it was given to the client, in the form of `plain_message`."""
        self.cut: Status | None = None
        """What ended the conversation after the answer: no room for one more, or the end of the rollout."""
        self.children: list[Turn] = []
        self.rewritten: set[int] = set()
        """Which of its messages a later request wrote in another way."""

    @property
    def end(self) -> int:
        """How many ids there are up to the end of the answer."""
        return self.start + (len(self.answer.ids) if self.answer else 0)

    def recorded(self) -> Messages:
        """Return the messages that this turn added to the conversation, the answer last."""
        return [*self.said, self.message]

    def path(self) -> list[Turn]:
        """Return the turns from the first to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def ids(self) -> list[int]:
        """Return all ids up to the end of the answer."""
        ids: list[int] = []
        for turn in self.path():
            ids += turn.shown
            ids += turn.answer.ids if turn.answer else []
        return ids

    def messages(self) -> Messages:
        """Return the conversation up to and with the answer."""
        return [message for turn in self.path() for message in turn.recorded()]


class TurnTree:
    """All turns of a session; one that fails is taken out again."""

    def __init__(self, *, tolerant: bool) -> None:
        self._roots: list[Turn] = []
        self._alike = similar if tolerant else same

    def turns(self) -> Iterator[Turn]:
        """Yield every turn."""
        waiting = list(self._roots)
        while waiting:
            turn = waiting.pop()
            yield turn
            waiting += turn.children

    def leaves(self) -> list[Turn]:
        """Return the last answers of all conversations, in the order of their requests."""
        answered = [turn for turn in self.turns() if turn.answer is not None]
        last = [turn for turn in answered if not any(child.answer for child in turn.children)]
        return sorted(last, key=lambda turn: turn.number)

    def ends(self) -> int:
        """Return how many conversations there are, those that requests under way begin included."""
        return sum(not turn.children for turn in self.turns())

    def followers(self, parent: Turn | None) -> list[Turn]:
        """Return what follows a turn so far; without one, the turns that begin a conversation."""
        return self._roots if parent is None else parent.children

    def find(self, messages: Messages, tools: list[dict[str, Any]]) -> Turn | None:
        """Return the turn that a request continues: the end of the longest recorded path that it repeats.

        Of several that are equal it is the latest. None where it repeats none, or adds nothing to it.
        """
        best, best_rank = None, (0, 0)
        waiting = [(root, 0) for root in self._roots if root.tools == tools]
        while waiting:
            turn, start = waiting.pop()
            end = start + len(turn.said) + 1
            if turn.answer is None or end >= len(messages):
                continue
            if self._difference(turn.recorded(), messages[start:end]) >= 0:
                continue
            if (end, turn.number) > best_rank:
                best, best_rank = turn, (end, turn.number)
            waiting += [(child, end) for child in turn.children]
        return best

    def nearest(self, messages: Messages) -> tuple[int, Messages]:
        """Return where a request leaves the recorded conversation that it agrees with longest, and that conversation.

        The position is -1 where it only repeats it.
        """
        answered = [turn.messages() for turn in self.turns() if turn.answer is not None]
        ranked = [(self._difference(recorded, messages), recorded) for recorded in answered]
        return max(ranked, key=lambda pair: pair[0] if pair[0] >= 0 else len(messages), default=(0, []))

    def _difference(self, recorded: Messages, sent: Messages) -> int:
        """Return the position of the first message that differs, -1 without one."""
        pairs = enumerate(zip(recorded, sent, strict=False))
        return next((i for i, (one, other) in pairs if not self._alike(one, other)), -1)

    def add(self, turn: Turn, number: int) -> None:
        """Add a turn that is under way."""
        others = self.followers(turn.parent)
        turn.number = number
        turn.attempt = 1 + max((other.attempt for other in others if other.shown == turn.shown), default=-1)
        given = (turn.parent.key if turn.parent else b"") + array("q", turn.shown).tobytes() + turn.attempt.to_bytes(4)
        turn.key = hashlib.blake2b(given, digest_size=8).digest()
        others.append(turn)

    def remove(self, turn: Turn) -> None:
        """Take a turn out that came to nothing."""
        self.followers(turn.parent).remove(turn)
