"""Verified local copies of shards in a bounded folder; local storage is verified in place, never copied or deleted.

A copy is fetched to a temporary name, checked against the manifest's digest, flushed to disk and renamed: a file under
its final name was whole when it got there. Every process hashes a copy once before it uses it; a file of local storage
is hashed by the first process of the machine, and again when it has changed (data/verified.py). Copies are named by
digest, so several processes, jobs and data folders share one cache folder; locks and leases are the kernel's
(data/file_locks.py), so a process that dies leaves none behind. A file that is unlinked while it is mapped stays
readable; its disk space is free when the last map is gone.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.storage import Storage, sync
from configs.errors import DataError
from data.eviction import NEVER, Cached, farthest_first, victims
from data.fetch import FULL_DISK, Deadline, FetchTimeout, StorageFetch, damaged, missing
from data.file_locks import exclusive, is_held, lease, remove_unleased
from data.manifest import ShardInfo
from data.shards import file_digest
from data.verified import VerifiedFiles

DEFAULT_TIMEOUT_SECONDS = 300.0
SUFFIX = ".arrow"
VERIFIED = ".verified-in-place"
UNUSABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})

# Puts verified content into a file, or raises.
Fetch = Callable[[ShardInfo, Path, Deadline], None]
# A context in which this process may fetch a shard, and from where.
Turn = Callable[[ShardInfo, Deadline], AbstractContextManager[Fetch]]
# Inode, time of change in nanoseconds, bytes: another file under the same name is verified anew.
Identity = tuple[int, int, int]


class NoRoom(Exception):
    """The cache holds nothing that is needed later than the shard to fetch ahead."""


class AskAgain(Exception):
    """The copy that was to be had from another node is gone; a new turn finds another source."""


@dataclass(frozen=True)
class Held:
    """A verified copy that cannot be evicted until `release`; `descriptor` is None for local storage."""

    path: str
    descriptor: int | None

    def release(self) -> None:
        """Let the copy be evicted."""
        if self.descriptor is not None:
            os.close(self.descriptor)


class ShardCache:
    """Copies of the shards of one data folder; safe to call from several threads.

    At most `cache_bytes` stay in the folder, all jobs' files counted, unless only leased ones are left. What is needed
    farthest in the future goes first (`next_use`); where nothing is announced, the least recently used.
    """

    def __init__(
        self,
        storage: Storage,
        data_folder: str,
        folder: str,
        cache_bytes: int,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        next_use: Callable[[str], float] = lambda digest: NEVER,
        turn: Turn | None = None,
    ) -> None:
        """`data_folder` is relative to `storage`; `next_use` takes a shard's digest.

        `turn` decides where a shard is fetched from; by default that is storage. Raises DataError when the folder
        cannot be made.
        """
        self._storage, self.is_local = storage.child(data_folder), storage.is_local
        self._folder, self._cache_bytes, self.timeout_seconds = Path(folder), cache_bytes, timeout_seconds
        self._next_use = next_use
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._verified: dict[str, Identity] = {}
        self._on_machine = VerifiedFiles(self._folder / VERIFIED)
        self.from_storage = StorageFetch(self._storage, count=self.count)
        self._turn = turn or self._own_turn
        if not self.is_local:
            with self._errors():
                self._folder.mkdir(parents=True, exist_ok=True)

    def count(self, name: str, amount: int) -> None:
        """Add to a statistic."""
        with self._lock:
            self._counts[name] += amount

    def statistics(self) -> dict[str, int]:
        """What was counted so far: bytes and requests to storage, hits, misses, evictions, damaged copies..."""
        with self._lock:
            return dict(self._counts)

    def hold(self, shard: ShardInfo) -> Held | None:
        """The verified copy with a lease on it, or None when it is not in the cache (a damaged copy is removed).

        Local storage: the file itself; raises DamagedShard, or DataError when it is absent.
        """
        if self.is_local:
            return Held(self._in_place(shard), None)
        target = self._target(shard)
        descriptor = lease(target)
        if descriptor is None:
            return None
        state = os.fstat(descriptor)
        identity = _identity(state)
        if self._verified.get(shard.digest) != identity:
            # Read through the leased descriptor's file: the name may stand for another file by now.
            if state.st_size != shard.bytes or file_digest(f"/dev/fd/{descriptor}") != shard.digest:
                self.count("damaged_copies", 1)
                os.close(descriptor)
                self._discard(target, identity)
                return None
            self._verified[shard.digest] = identity
        os.utime(descriptor, ns=(time.time_ns(), state.st_mtime_ns))
        return Held(str(target), descriptor)

    def path(self, shard: ShardInfo, deadline: Deadline | None = None, ahead_of: float | None = None) -> str:
        """Local path of a whole, verified copy, fetched if need be; it may be evicted when nobody leases it.

        `ahead_of`: this is a prefetch for that next use, and must not push out what is needed sooner (NoRoom).
        Raises FetchTimeout at the deadline (default: `timeout_seconds` from now), DamagedShard naming a shard whose
        content is not what its digest says, DataError naming one that is absent, or the folder when its disk is full.
        """
        deadline = deadline or Deadline(self.timeout_seconds)
        while True:
            held = self.hold(shard)
            if held is not None:
                held.release()
                self.count("hits", 1)
                return held.path
            try:
                with self._turn(shard, deadline) as fetch:
                    return self._fetched(shard, fetch, deadline, ahead_of)
            except AskAgain:
                continue

    def has_file(self, shard: ShardInfo) -> bool:
        """Whether a copy is there, verified or not."""
        return self.is_local or self._target(shard).exists()

    def digests(self) -> list[str]:
        """Digests of the files in the folder, verified or not."""
        return [] if self.is_local else [file.stem for file in self._folder.glob(f"*{SUFFIX}")]

    def _target(self, shard: ShardInfo) -> Path:
        return self._folder / f"{shard.digest}{SUFFIX}"

    def _lock_of(self, digest: str) -> Path:
        return self._folder / f".lock-{digest}"

    @contextmanager
    def _own_turn(self, shard: ShardInfo, deadline: Deadline) -> Iterator[Fetch]:
        yield self.from_storage

    def _in_place(self, shard: ShardInfo) -> str:
        path = self._storage.local_path(shard.path)
        assert path is not None
        try:
            state = Path(path).stat()
            if self._verified.get(shard.digest) != _identity(state):
                if not self._on_machine.knows(shard.digest, state):
                    actual = file_digest(path)
                    if actual != shard.digest:
                        raise damaged(shard, self._storage.url, actual)
                    self._on_machine.add(shard.digest, state)
                self._verified[shard.digest] = _identity(state)
        except FileNotFoundError as error:
            raise missing(shard, self._storage.url) from error
        return path

    def _fetched(self, shard: ShardInfo, fetch: Fetch, deadline: Deadline, ahead_of: float | None) -> str:
        with self._errors(shard), self._exclusive(self._lock_of(shard.digest), shard, deadline):
            # Another process may have fetched it while this one waited for the lock.
            held = self.hold(shard)
            if held is None:
                self.count("misses", 1)
                self._fill(shard, fetch, deadline, ahead_of)
                held = self.hold(shard)
            if held is None:
                raise AskAgain
            held.release()
            return held.path

    def _fill(self, shard: ShardInfo, fetch: Fetch, deadline: Deadline, ahead_of: float | None) -> None:
        temporary = self._reserve(shard, deadline, ahead_of)
        try:
            try:
                fetch(shard, temporary, deadline)
                sync(temporary)
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                temporary.unlink(missing_ok=True)
                self._free_disk(shard, deadline)
                fetch(shard, temporary, deadline)
                sync(temporary)
            identity = _identity(temporary.stat())
            temporary.replace(self._target(shard))
            sync(self._folder)
            self._verified[shard.digest] = identity
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, shard: ShardInfo, deadline: Deadline, ahead_of: float | None) -> Path:
        """An empty temporary file whose name reserves the shard's bytes, after room has been made for them."""
        temporary = self._folder / f".tmp-{shard.digest}-{shard.bytes}-{uuid.uuid4().hex}"
        with self._exclusive(self._folder / ".room", shard, deadline):
            reserved = self._reserved(shard.digest)
            excess = self._make_room(shard.bytes + reserved, -1.0 if ahead_of is None else ahead_of)
            if excess > 0:
                if ahead_of is not None:
                    raise NoRoom
                self.count("over_budget_bytes", excess)
            temporary.touch(0o600)
        return temporary

    def _make_room(self, needed: int, keep_until: float) -> int:
        """Evict until `needed` bytes fit in the budget; bytes by which they still do not."""
        cached = self._cached()
        while True:
            names = victims(cached, needed, self._cache_bytes, keep_until)
            gone = self._evict(names)
            # Which files are leased shows when they are to be removed.
            cached = [
                replace(file, leased=file.leased or file.name in names) for file in cached if file.name not in gone
            ]
            if len(gone) == len(names):
                return sum(file.bytes for file in cached) + needed - self._cache_bytes

    def _reserved(self, digest: str) -> int:
        """Bytes that unfinished fetches will take; removes those whose process is gone.

        The caller holds the lock of `digest`: unfinished fetches of it are of processes that are gone.
        """
        reserved = 0
        for file in self._folder.glob(".tmp-*"):
            of, size = file.name.split("-")[1:3]
            if of != digest and is_held(self._lock_of(of)):
                reserved += int(size)
            else:
                file.unlink(missing_ok=True)
        return reserved

    def _cached(self) -> list[Cached]:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    try:
                        state = entry.stat()
                    except FileNotFoundError:
                        continue
                    use = self._next_use(entry.name.removesuffix(SUFFIX))
                    found.append(Cached(entry.name, state.st_size, use, state.st_atime_ns))
        return found

    def _evict(self, names: list[str]) -> set[str]:
        """Remove those files that no process leases; which."""
        gone = {name for name in names if remove_unleased(self._folder / name)}
        for name in gone:
            self._verified.pop(name.removesuffix(SUFFIX), None)
        self.count("evictions", len(gone))
        return gone

    def _free_disk(self, shard: ShardInfo, deadline: Deadline) -> None:
        """Evict until the disk has room for the shard, or only leased files are left."""
        with self._exclusive(self._folder / ".room", shard, deadline):
            for file in farthest_first(self._cached()):
                if shutil.disk_usage(self._folder).free >= shard.bytes:
                    return
                self._evict([file.name])

    def _discard(self, target: Path, identity: Identity) -> None:
        """Remove a damaged copy, leased or not: whoever has it mapped verified it and keeps what it mapped."""
        try:
            if _identity(target.stat()) == identity:
                target.unlink()
        except FileNotFoundError:
            return

    def _disk_full(self, shard: ShardInfo) -> DataError:
        free = shutil.disk_usage(self._folder).free
        return DataError(
            f"shard cache {self._folder}: the disk is full: shard {shard.path} needs {shard.bytes} bytes, {free} are "
            "free and nothing is left to evict; free space there, lower data.cache_bytes, or set TELAR_SHARD_CACHE to "
            "a folder on a larger disk"
        )

    @contextmanager
    def _exclusive(self, lock: Path, shard: ShardInfo, deadline: Deadline) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(lock, deadline))
            except TimeoutError as error:
                raise FetchTimeout(
                    f"shard {shard.path}: {error}; raise data.fetch_timeout_seconds or end that process"
                ) from error
            yield

    @contextmanager
    def _errors(self, shard: ShardInfo | None = None) -> Iterator[None]:
        """Errors of the local disk as errors that name the folder."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL_DISK and shard is not None:
                raise self._disk_full(shard) from error
            if error.errno in UNUSABLE:
                raise DataError(
                    f"shard cache {self._folder}: {error.strerror} ({error.filename}); make it a folder that this user "
                    "may write, or set TELAR_SHARD_CACHE to another one"
                ) from error
            raise


def _identity(state: os.stat_result) -> Identity:
    return state.st_ino, state.st_mtime_ns, state.st_size
