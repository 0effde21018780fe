"""Finds and ends the processes of one embedded cluster, and no others, and what they leave in shared memory.

Ray's processes do not all stay in one process group: workers lead groups of their own and job drivers sessions of
their own. A process belongs to the cluster if it is in the head's session, carries the cluster's mark in its
environment (Ray renames some processes in a way that overwrites that), or descends from one that does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.errors import TelarError

MARK_VARIABLE = "TELAR_CLUSTER_MARK"
SHARED_MEMORY = Path("/dev/shm")
SWEPT_PREFIX = "deepspeed_allreduce_buffer"


@dataclass(frozen=True)
class Mark:
    """Identity of a cluster's processes: the head's process id (its session's id), start time, environment mark."""

    pid: int
    created_unix: float
    text: str

    def head_is_alive(self) -> bool:
        """Whether the very process that was started as head still runs."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created_unix) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def members(mark: Mark) -> list[psutil.Process]:
    """Living processes of the cluster."""
    session_is_ours = mark.head_is_alive() or not psutil.pid_exists(mark.pid)
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            in_session = session_is_ours and os.getsid(process.pid) == mark.pid
            if (in_session or process.environ().get(MARK_VARIABLE) == mark.text) and _runs(process):
                found[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            continue
    for process in list(found.values()):
        try:
            found.update({child.pid: child for child in process.children(recursive=True) if _runs(child)})
        except psutil.NoSuchProcess:
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def end(mark: Mark, grace_seconds: float = 3.0, deadline_seconds: float = 20.0) -> list[int]:
    """End the cluster's processes: SIGTERM, after the grace SIGKILL, until none is left; returns their ids.

    Raises TelarError when some survive the deadline. Files in shared memory that only they mapped are removed.
    """
    started, seen = time.monotonic(), set()
    mapped: set[Path] = set()
    kill = False
    while processes := members(mark):
        mapped |= shared_memory_of(processes)
        others = [process for process in processes if process.pid != mark.pid]
        # The head (`cluster.reaper`) leaves by itself when it has reaped all others.
        for process in others or (processes if kill else []):
            try:
                if kill:
                    process.kill()
                elif process.pid not in seen:
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
            seen.add(process.pid)
        psutil.wait_procs(processes, timeout=0.2)
        elapsed = time.monotonic() - started
        kill = elapsed > grace_seconds
        if elapsed > deadline_seconds:
            raise TelarError(f"processes {sorted(p.pid for p in members(mark))} of the embedded cluster do not end")
    sweep_shared_memory(mapped)
    return sorted(seen)


def shared_memory_of(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that the processes map or hold open."""
    found: set[Path] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines()
            paths = [line.split(maxsplit=5)[-1] for line in lines if f" {SHARED_MEMORY}/" in line]
            paths += [file.path for file in process.open_files()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
        found |= {Path(path) for path in paths if path.startswith(f"{SHARED_MEMORY}/")}
    return found


def sweep_shared_memory(mapped: set[Path]) -> list[str]:
    """Remove files of ended processes, and DeepSpeed's buffers of this user that no process maps any more."""
    if not SHARED_MEMORY.is_dir():
        return []
    orphans = {path for path in SHARED_MEMORY.glob(f"{SWEPT_PREFIX}_{os.getuid()}_*") if path.is_file()}
    candidates = {path for path in mapped | orphans if path.exists() and path.stat().st_uid == os.getuid()}
    if not candidates:
        return []
    candidates -= shared_memory_of(psutil.process_iter())
    for path in candidates:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in candidates)


def _runs(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE
