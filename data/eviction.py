"""Which cached shards to give up: those needed farthest in the future (Belady 1966), as far as the future is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NEVER = math.inf


@dataclass(frozen=True)
class Cached:
    """A file in the cache. `next_use` is its place in the announced order, NEVER when nobody announced it."""

    name: str
    bytes: int
    next_use: float = NEVER
    last_use: float = 0.0
    leased: bool = False


def farthest_first(cached: Iterable[Cached]) -> list[Cached]:
    """Files without a lease, in the order to give them up: farthest next use, then least recently used."""
    return sorted((file for file in cached if not file.leased), key=lambda file: (-file.next_use, file.last_use))


def victims(cached: Sequence[Cached], needed_bytes: int, budget_bytes: int, keep_until: float = -1.0) -> list[str]:
    """Names of files to remove, in order, so that `needed_bytes` more fit in the budget.

    Files under a lease and files whose next use is at or before `keep_until` are never chosen; when the others do not
    suffice, all of them are.
    """
    excess = sum(file.bytes for file in cached) + needed_bytes - budget_bytes
    chosen: list[str] = []
    for file in farthest_first(cached):
        if excess <= 0:
            break
        if file.next_use > keep_until:
            chosen.append(file.name)
            excess -= file.bytes
    return chosen


class NextUses:
    """Announced orders of first use of several readers, merged: a shard's next use is the earliest place in any."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, int]] = {}

    def announce(self, reader: str, names: Sequence[str]) -> None:
        """Replace what this reader announced before."""
        places: dict[str, int] = {}
        for place, name in enumerate(names):
            places.setdefault(name, place)
        self._places[reader] = places

    def used(self, reader: str, name: str) -> None:
        """The reader has it now; its next use is not known until it announces it again."""
        self._places.get(reader, {}).pop(name, None)

    def readers(self) -> list[str]:
        """Readers that have announced something."""
        return list(self._places)

    def forget(self, reader: str) -> None:
        """The reader is gone."""
        self._places.pop(reader, None)

    def next_use(self, name: str) -> float:
        """Earliest place in any reader's order, or NEVER."""
        return min((places[name] for places in list(self._places.values()) if name in places), default=NEVER)

    def order(self) -> list[str]:
        """All announced names, earliest first."""
        merged: dict[str, int] = {}
        for places in list(self._places.values()):
            for name, place in list(places.items()):
                merged[name] = min(place, merged.get(name, place))
        return sorted(merged, key=lambda name: merged[name])
