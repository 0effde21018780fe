"""Energy of work on the CPU: joules from the processor's own counters where they can be read, else an estimate.

Measured: Intel's and AMD's RAPL counters of whole packages (Linux powercap), of which this process gets its share of
the machine's CPU time; memory, fans and power supply are not in them. Estimated: CPU time of this process times 4 W,
what codecarbon takes for a thread of a processor that it does not know. A sum of both is called mixed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

POWERCAP = Path("/sys/class/powercap")
# DEFAULT_POWER_PER_CORE of codecarbon 3 (codecarbon/core/cpu.py).
WATTS_PER_THREAD = 4.0
JOULES_PER_KWH = 3.6e6

Kind = Literal["measured", "estimated", "mixed"]


@dataclass(frozen=True)
class Energy:
    """Joules that work took, the seconds it lasted, and how the joules are known."""

    joules: float
    seconds: float
    kind: Kind

    def __add__(self, other: Energy) -> Energy:
        kind = self.kind if self.kind == other.kind else "mixed"
        return Energy(self.joules + other.joules, self.seconds + other.seconds, kind)


@dataclass(frozen=True)
class Counter:
    """One package's counter: where it is read, and at which value in microjoules it starts again from zero."""

    file: Path
    range_microjoules: int

    def read(self) -> int:
        """Microjoules since some time in the past; raises OSError or ValueError when it cannot be read."""
        return int(self.file.read_text())


def counters(root: Path = POWERCAP) -> list[Counter]:
    """Counters of all packages that this process may read; none where there is one that it may not."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        # `intel-rapl:0:1` is a part of package 0.
        if folder.name.count(":") != 1:
            continue
        try:
            if not (folder / "name").read_text().startswith("package"):
                continue
            counter = Counter(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
            counter.read()
        except (OSError, ValueError):
            return []
        found.append(counter)
    return found


class Meter:
    """Measures from its making to `stop`, for this process with all its threads."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._counters = counters(root)
        self._started = time.monotonic()
        self._process, self._machine = _process_seconds(), _machine_seconds()
        self._before = [counter.read() for counter in self._counters]

    def stop(self) -> Energy:
        """The energy so far."""
        seconds, own = time.monotonic() - self._started, _process_seconds() - self._process
        if not self._counters:
            return Energy(own * WATTS_PER_THREAD, seconds, "estimated")
        joules = sum(
            (counter.read() - before) % (counter.range_microjoules + 1) / 1e6
            for counter, before in zip(self._counters, self._before, strict=True)
        )
        whole = _machine_seconds() - self._machine
        return Energy(joules * (min(1.0, own / whole) if whole > 0 else 0.0), seconds, "measured")


def _process_seconds() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def _machine_seconds() -> float:
    """CPU time that all processes of the machine have used."""
    times = psutil.cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "steal", 0.0)
    # Time of guests is in `user` already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return sum(times) - waiting - guests
