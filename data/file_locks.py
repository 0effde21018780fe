"""Locks and leases on files that the kernel drops when their process ends, however it ends (flock(2)).

A reader leases a cached file with a shared lock on it; whoever wants to remove the file needs the exclusive one. A
lock that guards an action (fetching one shard, making room) is an exclusive lock on a file of its own.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.fetch import Deadline

POLL_SECONDS = 0.01


def lease(path: str | Path) -> int | None:
    """A descriptor that keeps the file from being evicted until it is closed; None when there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    # Waits for an eviction in progress at most, which is an unlink.
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def remove_unleased(path: str | Path) -> bool:
    """Remove a file unless a process has a lease on it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            Path(path).unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def is_held(path: str | Path) -> bool:
    """Whether some thread or process holds the lock `exclusive(path)`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: str | Path, deadline: Deadline) -> Iterator[None]:
    """Hold the lock of that name among threads and processes; raises TimeoutError at the deadline."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder removed its file: the lock on it means nothing to those who come later.
            if _is_at(descriptor, path):
                break
        except BlockingIOError:
            if deadline.left() <= 0:
                os.close(descriptor)
                raise TimeoutError(f"another process has held {path} for {deadline.seconds:g} s") from None
            time.sleep(POLL_SECONDS)
        os.close(descriptor)
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, path: str | Path) -> bool:
    try:
        there = Path(path).stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)
