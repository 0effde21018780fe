"""Fetching announced shards ahead of need, in the order of their first use, within a bound on bytes in flight."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import psutil

from configs.errors import DataError
from data.eviction import NEVER, NextUses
from data.manifest import ShardInfo
from data.shard_cache import NoRoom, ShardCache

THREADS = 4


def reader_name(number: int) -> str:
    """A name for a reader in this process, from which others can tell whether the process still runs."""
    process = psutil.Process()
    return f"{process.pid}-{process.create_time():.2f}-{number}"


def reader_lives(name: str) -> bool:
    """Whether the process that `reader_name` named still runs."""
    pid, created, _ = name.split("-")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == created
    except psutil.NoSuchProcess:
        return False


class Prefetcher:
    """Keeps the cache filled with what readers have announced. Its threads are daemons: they hold up no exit.

    A shard that cannot be fetched ahead is skipped here; the error is raised where the shard is asked for.
    """

    def __init__(self, cache: ShardCache, uses: NextUses, in_flight_bytes: int) -> None:
        """`uses` is what the cache evicts by; at most `in_flight_bytes` are fetched at a time, one shard at least."""
        self._cache, self._uses, self._limit = cache, uses, in_flight_bytes
        self._condition = threading.Condition()
        self._queue: list[ShardInfo] = []
        self._in_flight: dict[str, int] = {}
        self._full = False
        # How often room may have come about: what a fetch found full may have had some since.
        self._releases = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def announce(self, reader: str, shards: Sequence[ShardInfo]) -> None:
        """These are the shards the reader will need, in order of first use; replaces its earlier announcement."""
        if self._cache.is_local:
            return
        known = {shard.digest: shard for shard in shards}
        with self._condition:
            for other in self._uses.readers():
                if not reader_lives(other):
                    self._uses.forget(other)
            self._uses.announce(reader, [shard.digest for shard in shards])
            known |= {shard.digest: shard for shard in self._queue}
            self._queue = [known[digest] for digest in self._uses.order() if digest in known]
            while len(self._threads) < THREADS:
                thread = threading.Thread(target=self._work, name="telar-prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()
        self.released()

    def used(self, reader: str, shard: ShardInfo) -> None:
        """The reader has the shard."""
        with self._condition:
            self._uses.used(reader, shard.digest)
        self.released()

    def released(self) -> None:
        """Something in the cache may be evicted now that could not be before: look again."""
        with self._condition:
            self._full = False
            self._releases += 1
            self._condition.notify_all()

    def close(self) -> None:
        """End the threads after the fetches in progress; does not wait."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _next(self) -> ShardInfo | None:
        """The next shard to fetch, if one may be started now; the caller holds the condition."""
        while self._queue and not self._full:
            shard = self._queue[0]
            if self._in_flight and sum(self._in_flight.values()) + shard.bytes > self._limit:
                return None
            self._queue.pop(0)
            wanted = self._uses.next_use(shard.digest) is not NEVER
            if wanted and shard.digest not in self._in_flight and not self._cache.has_file(shard):
                self._in_flight[shard.digest] = shard.bytes
                return shard
        return None

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or (self._queue and not self._full))
                shard = None if self._closed else self._next()
                if shard is None:
                    if self._closed:
                        return
                    if self._queue and not self._full:
                        # Too much is in flight; the next fetch that ends wakes this thread.
                        self._condition.wait()
                    continue
                releases = self._releases
            outcome = self._fetch(shard)
            with self._condition:
                del self._in_flight[shard.digest]
                if outcome == "prefetch_no_room":
                    self._queue.insert(0, shard)
                    self._full = releases == self._releases
                self._condition.notify_all()
            self._cache.count(outcome, 1)

    def _fetch(self, shard: ShardInfo) -> str:
        try:
            self._cache.path(shard, ahead_of=self._uses.next_use(shard.digest))
        except NoRoom:
            return "prefetch_no_room"
        except (DataError, OSError):
            return "prefetch_failed"
        return "prefetched"
