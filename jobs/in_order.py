"""Messages that may arrive in another order than they were sent in, handed on in the order of their numbers."""

from __future__ import annotations

from typing import Generic, TypeVar

Message = TypeVar("Message")
# So many are waited for behind a gap before the missing one is given up: it may have been lost with a connection.
MOST_HELD = 32


class InOrder(Generic[Message]):
    """Holds back what is early. Numbers count from 0 in each series; a series ends when a later one begins."""

    def __init__(self) -> None:
        self._series, self._next = -1, 0
        self._held: dict[int, Message] = {}

    def put(self, series: int, number: int, message: Message) -> list[Message]:
        """What is due now, in order. The rest of an earlier series comes first; what comes after its turn, at once."""
        due: list[Message] = []
        if series > self._series:
            due += self.rest()
            self._series, self._next = series, 0
        if series < self._series or number < self._next:
            return [*due, message]
        self._held[number] = message
        if len(self._held) > MOST_HELD:
            self._next = min(self._held)
        while self._next in self._held:
            due.append(self._held.pop(self._next))
            self._next += 1
        return due

    def rest(self) -> list[Message]:
        """All that is held back, in order."""
        found = [self._held[number] for number in sorted(self._held)]
        self._held.clear()
        return found
