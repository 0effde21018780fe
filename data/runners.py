"""How preparation's tasks are run, and how their progress is told; this process is the simplest way to run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

REPORT_SECONDS = 5.0


def nobody(_number: int) -> None:
    """Hears of a finished task and does nothing."""


class Runner(Protocol):
    """Maps a module-level function over argument tuples; results come in the order of the arguments."""

    def __call__(
        self, function: Callable[..., Any], arguments: Sequence[tuple], done: Callable[[int], None] = nobody
    ) -> list[Any]:
        """Call `function` for each tuple; `done` hears the number of each task that has ended, in any order."""


def serial(function: Callable[..., Any], arguments: Sequence[tuple], done: Callable[[int], None] = nobody) -> list[Any]:
    """Call `function` in this process for each tuple of arguments, in order."""
    results = []
    for number, each in enumerate(arguments):
        results.append(function(*each))
        done(number)
    return results


class Progress:
    """Tells how far a phase is, at most every REPORT_SECONDS and at its end: `extract 12/40 parts, 3.4 GB, 120 MB/s`.

    `sizes` are the bytes of each task. A phase that ends before the first line is due says nothing.
    """

    def __init__(
        self,
        label: str,
        sizes: Sequence[int],
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._sizes, self._report, self._clock = label, sizes, report, clock
        self._started = self._told = clock()
        self._ended = self._bytes = 0
        self._spoke = False

    def __call__(self, number: int) -> None:
        """Task `number` has ended."""
        self._ended += 1
        self._bytes += self._sizes[number]
        now = self._clock()
        last = self._ended == len(self._sizes)
        if now - self._told >= REPORT_SECONDS or (last and self._spoke):
            rate = self._bytes / max(now - self._started, 1e-9)
            self._report(
                f"{self._label} {self._ended}/{len(self._sizes)} parts, {self._bytes / 1e6:,.1f} MB, "
                f"{rate / 1e6:,.1f} MB/s"
            )
            self._told, self._spoke = now, True
