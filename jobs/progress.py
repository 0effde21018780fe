"""A rank's signs of life, and how long a rank may go without one before it counts as hung."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

# A step may take so many times as long as the longest of the last ones.
PATIENCE = 10.0
STEPS_REMEMBERED = 50


# Of a mean over steps, what the latest step counts.
LATEST_WEIGHT = 0.1


class Beat(NamedTuple):
    """The latest sign of life: how many there were, what the rank does since (starting, data, step, storage).

    `data_wait_seconds` is how long it waits for the data of a step, a mean in which the latest count most.
    """

    count: int
    doing: str
    step: int
    data_wait_seconds: float = 0.0


class Progress:
    """Kept by the training thread, read from another one: a beat is one assignment."""

    def __init__(self) -> None:
        self.latest = Beat(0, "starting", 0)
        self._at = time.monotonic()

    def beat(self, doing: str, step: int) -> None:
        """Something was finished; `doing` names what comes now."""
        before, began, self._at = self.latest, self._at, time.monotonic()
        wait = before.data_wait_seconds
        if before.doing == "data":
            wait += LATEST_WEIGHT * (self._at - began - wait)
        self.latest = Beat(before.count + 1, doing, step, wait)


class HangWatch:
    """Finds the ranks of one attempt that do nothing. Times are in seconds of the caller's clock.

    Ranks wait for each other in every step, so one that hangs stops all. Those are named that do not answer at all, or,
    where all answer, that are furthest behind.
    """

    def __init__(
        self, ranks: int, floor_seconds: float, first_seconds: float, data_seconds: float, storage_seconds: float
    ) -> None:
        """`first_seconds` is allowed until the first step is done, `data_seconds` more while a rank waits for data,
        `storage_seconds` more while one waits for an upload, which gives itself up in that time."""
        self._beats: list[Beat | None] = [None] * ranks
        self._changed, self._heard = [0.0] * ranks, [0.0] * ranks
        self._floor, self._first = floor_seconds, first_seconds
        self._more = {"data": data_seconds, "storage": storage_seconds}
        self._seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)

    def step_took(self, seconds: float) -> None:
        """A step of the attempt is done."""
        self._seconds.append(seconds)

    def heard(self, rank: int, beat: Beat, at: float) -> None:
        """A rank said what its latest sign of life is; an old one again is none."""
        self._heard[rank] = at
        if beat != self._beats[rank]:
            self._beats[rank], self._changed[rank] = beat, at

    @property
    def all_train(self) -> bool:
        """Whether every rank has left its start behind."""
        return all(beat is not None and beat.doing != "starting" for beat in self._beats)

    def slowest(self) -> tuple[int, float] | None:
        """The rank that waits longest for its data, for which all others wait in every step, and its seconds a step.

        None until all have begun, and where there is one rank only.
        """
        if not self.all_train or len(self._beats) < 2:
            return None
        waits = [beat.data_wait_seconds for beat in self._beats if beat is not None]
        return max(enumerate(waits), key=lambda entry: entry[1])

    def deadline_seconds(self) -> float:
        """How long no rank may give a sign of life."""
        if not self._seconds:
            return max(self._floor, self._first)
        seconds = max(self._floor, PATIENCE * max(self._seconds))
        waits = [self._more.get(beat.doing, 0.0) for beat in self._beats if beat is not None]
        return seconds + max(waits, default=0.0)

    def hung(self, at: float) -> list[int]:
        """The ranks that stop the attempt, when some rank gave no sign of life for the deadline; else none."""
        deadline = self.deadline_seconds()
        if not self.all_train or at - min(self._changed) <= deadline:
            return []
        silent = [rank for rank, heard in enumerate(self._heard) if at - heard > deadline / 2]
        if silent:
            return silent
        fewest = min(beat.count for beat in self._beats)
        return [rank for rank, beat in enumerate(self._beats) if beat.count == fewest]
