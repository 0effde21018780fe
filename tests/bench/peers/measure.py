"""What a process and its children used: CPU seconds, memory, bytes read from disk."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


def _tree() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def cpu_seconds() -> float:
    """User and system seconds of this process, its living children and the dead ones that were waited for."""
    total = 0.0
    for process in _tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def age_seconds() -> float:
    """Seconds since this process was started, to a tick of the kernel (10 ms)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int:
    """Sum of the peak resident sizes of this process and its living children."""
    return sum(_status(process.pid, "VmHWM") for process in _tree())


def pss_bytes() -> int:
    """Proportional resident size of the tree now: pages shared by several processes count once."""
    total = 0
    for process in _tree():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def rss_bytes() -> int:
    """Resident size of this process now."""
    return _status(os.getpid(), "VmRSS")


def disk_bytes() -> int:
    """Bytes that the tree had the disk read, also through memory maps (read_bytes of /proc/PID/io)."""
    total = 0
    for process in _tree():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/io").read_text().splitlines():
                if line.startswith("read_bytes:"):
                    total += int(line.split()[1])
    return total


def _status(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass
class Clock:
    """Wall and CPU seconds since it was made."""

    def __post_init__(self) -> None:
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        wall = time.perf_counter() - self._wall
        return {"wall_seconds": wall, "cpu_seconds": cpu_seconds() - self._cpu}
