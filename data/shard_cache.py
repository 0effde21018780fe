"""Verified local copies of shards in a bounded folder; local storage is verified in place and never copied.

A copy is fetched to a temporary name, checked against the manifest's digest, flushed to disk and renamed: a file under
its final name is whole. Files found from an earlier process are checked again before they are first handed out.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
import uuid
from pathlib import Path

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import Manifest, ShardInfo
from data.shards import file_digest

FETCH_TRIES = 6
FIRST_BACKOFF_SECONDS = 0.2
MOST_BACKOFF_SECONDS = 10.0
# A path that was told this recently is not evicted: its reader may not have mapped the file yet.
LEASE_SECONDS = 30.0
ABANDONED_SECONDS = 3600.0
COPY_BYTES = 1 << 20


class ShardCache:
    """`path(shard)` for the shards of one manifest; safe to call from several threads.

    Of remote storage at most `cache_bytes` stay on disk, plus what is leased; the least recently used shards go first.
    """

    def __init__(self, storage: Storage, manifest: Manifest, folder: str, cache_bytes: int) -> None:
        self._storage, self._manifest = storage.child(manifest.folder), manifest
        self._folder, self._cache_bytes = Path(folder) / manifest.digest, cache_bytes
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._verified: set[str] = set()
        # Bytes and time of the latest use of each cached file, by shard path; times are monotonic seconds.
        self._sizes: dict[str, int] = {}
        self._used: dict[str, float] = {}
        self.fetched_bytes = 0
        if not storage.is_local:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._adopt()

    def path(self, shard: ShardInfo) -> str:
        """Local path of a whole, verified copy.

        Raises DataError naming the shard when it is absent, or when its content differs from its digest (after one
        more fetch); OSError when storage cannot be read in FETCH_TRIES tries.
        """
        with self._lock:
            busy = self._busy.setdefault(shard.path, threading.Lock())
        with busy:
            if self._storage.is_local:
                return self._local(shard)
            target = self._folder / _file_name(shard)
            if target.is_file() and shard.path not in self._verified and file_digest(str(target)) != shard.digest:
                target.unlink()
            if not target.is_file():
                self._make_room(shard)
                self._fetch_verified(shard, target)
            with self._lock:
                self._verified.add(shard.path)
                self._sizes[shard.path] = shard.bytes
                self._used[shard.path] = time.monotonic()
            return str(target)

    def _local(self, shard: ShardInfo) -> str:
        path = self._storage.local_path(shard.path)
        assert path is not None
        if shard.path not in self._verified:
            try:
                actual = file_digest(path)
            except FileNotFoundError as error:
                raise self._missing(shard) from error
            if actual != shard.digest:
                raise self._damaged(shard, actual)
            self._verified.add(shard.path)
        return path

    def _fetch_verified(self, shard: ShardInfo, target: Path) -> None:
        temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")
        try:
            for attempt in (1, 2):
                self._fetch(shard, temporary)
                actual = file_digest(str(temporary))
                if actual == shard.digest:
                    temporary.replace(target)
                    return
                if attempt == 2:
                    raise self._damaged(shard, actual)
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, shard: ShardInfo, temporary: Path) -> None:
        for attempt in range(1, FETCH_TRIES + 1):
            try:
                with self._storage.open(shard.path) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, COPY_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
                    self.fetched_bytes += file.tell()
                return
            except FileNotFoundError as error:
                raise self._missing(shard) from error
            except OSError:
                if attempt == FETCH_TRIES:
                    raise
                # Jitter keeps the nodes of a cluster from asking again all at once.
                backoff = min(FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1), MOST_BACKOFF_SECONDS)
                time.sleep(backoff * random.uniform(0.5, 1.0))

    def _make_room(self, shard: ShardInfo) -> None:
        """Evict until the shard fits in the budget, or only leased files are left."""
        with self._lock:
            now = time.monotonic()
            for name in sorted(self._sizes, key=lambda path: self._used[path]):
                if sum(self._sizes.values()) + shard.bytes <= self._cache_bytes:
                    return
                if now - self._used[name] < LEASE_SECONDS:
                    return
                (self._folder / name.replace("/", "--")).unlink(missing_ok=True)
                del self._sizes[name], self._used[name]
                self._verified.discard(name)

    def _adopt(self) -> None:
        """Count files that an earlier process left, and remove its unfinished fetches."""
        shards = {_file_name(shard): shard for corpus in self._manifest.corpora for shard in corpus.shards}
        for file in self._folder.iterdir():
            if file.name in shards:
                self._sizes[shards[file.name].path] = file.stat().st_size
                self._used[shards[file.name].path] = -LEASE_SECONDS
            elif file.name.startswith(".tmp-") and time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                file.unlink(missing_ok=True)

    def _missing(self, shard: ShardInfo) -> DataError:
        return DataError(
            f"shard {shard.path}: {self._storage.url}/{shard.path} does not exist; run the prepare stage again, "
            "it makes what is missing"
        )

    def _damaged(self, shard: ShardInfo, actual: str) -> DataError:
        return DataError(
            f"shard {shard.path}: {self._storage.url}/{shard.path} does not match its digest (manifest {shard.digest}, "
            f"file {actual}); remove the file and run the prepare stage again"
        )


def _file_name(shard: ShardInfo) -> str:
    return shard.path.replace("/", "--")
