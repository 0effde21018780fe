"""Which files this machine has compared with their digests, kept across processes, so that a resume reads none twice.

A file counts as the one that was compared while device, inode, both times and size are the same: the kernel sets the
time of change on every write, and no program can set it back. What a disk loses by itself shows in none of these; the
digest of each record batch, compared before its tokens are first read, finds that (data/shards.py).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

# A file that changed this short a time ago could change again without its times showing it (git's "racy" entries).
SETTLED_SECONDS = 2.0
# Some half a million files; then the list is begun anew.
MOST_BYTES = 64 * 2**20


class VerifiedFiles:
    """A list of digests with identities, in one file that processes append to. Safe to call from several threads."""

    def __init__(self, path: Path) -> None:
        """`path` is made, with its folder, by the first `add`."""
        self._path = path
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._read_bytes = 0
        self._usable = True

    def knows(self, digest: str, state: os.stat_result) -> bool:
        """Whether some process on this machine found that this very file has this digest."""
        entry = _entry(digest, state)
        with self._lock:
            if entry not in self._known:
                self._read_on()
            return entry in self._known

    def add(self, digest: str, state: os.stat_result) -> None:
        """Note that a file, as it was at `state`, has this digest. Where that cannot be written, the log says so."""
        entry = _entry(digest, state)
        with self._lock:
            if not self._usable or time.time() - state.st_ctime < SETTLED_SECONDS:
                return
            self._known.add(entry)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    if os.fstat(descriptor).st_size > MOST_BYTES:
                        os.ftruncate(descriptor, 0)
                    # In one call: appends of several processes do not mix. The line break in front ends a line that a
                    # full disk cut.
                    os.write(descriptor, f"\n{entry}\n".encode())
                finally:
                    os.close(descriptor)
            except OSError as error:
                self._usable = False
                logging.warning("%s cannot be written (%s): each process hashes its shards anew", self._path, error)

    def _read_on(self) -> None:
        """Take in what was appended since the last look; lines of another form never equal an entry."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                content = file.read()
        except OSError:
            # Not there yet, or not for us to read: nothing is known then, and files are compared anew.
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        self._known.update(whole.decode("ascii", "replace").split("\n"))


def _entry(digest: str, state: os.stat_result) -> str:
    times = f"{state.st_mtime_ns} {state.st_ctime_ns}"
    return f"{digest} {state.st_dev} {state.st_ino} {times} {state.st_size}"
