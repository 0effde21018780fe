"""Fetching one shard from storage through fsspec: classified errors, jittered back-off, a deadline that always holds.

A transfer that brings no byte for a while is given up and tried again: on stores with an asynchronous client it is
cancelled; elsewhere it runs in a daemon thread that is left behind, and stops at its next byte.
"""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import ShardInfo
from data.shards import file_digest

FIRST_BACKOFF_SECONDS = 0.2
MOST_BACKOFF_SECONDS = 10.0
# A transfer without a new byte for this long (or a quarter of the time allowed, if that is less) has stalled.
STALL_SECONDS = 30.0
COPY_BYTES = 1 << 20
# A file that arrives complete but shorter than the manifest says is asked for again before it counts as damaged.
SHORT_TRIES = 2
CANCEL_SECONDS = 1.0
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
TRANSIENT_STATUS = frozenset({408, 425, 429})
# Clients whose errors are no OSErrors; what they raise concerns the connection, unless a status code says otherwise.
CLIENT_PACKAGES = frozenset({"adlfs", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"})


class FetchTimeout(DataError):
    """A shard did not arrive in the time that `data.fetch_timeout_seconds` allows."""


class DamagedShard(DataError):
    """The copy of a shard in storage does not match its digest, after one more fetch."""


class Deadline:
    """A point in time, `seconds` after it was made."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - self._clock())


def classify(error: BaseException) -> str:
    """`permanent`, `transient`, `disk` (the local one is full) or `unknown` (no error of a store)."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return "permanent"
    status = next(
        (value for name in ("status", "status_code", "code") if isinstance(value := getattr(error, name, None), int)), 0
    )
    if 400 <= status < 600:
        return "transient" if status in TRANSIENT_STATUS or status >= 500 else "permanent"
    if isinstance(error, OSError):
        return "disk" if error.errno in FULL_DISK else "transient"
    if isinstance(error, EOFError):
        return "transient"
    return "transient" if type(error).__module__.split(".")[0] in CLIENT_PACKAGES else "unknown"


def backoff_seconds(failures: int, draw: Callable[[], float] = random.random) -> float:
    """Full jitter (Brooker 2015): uniform in [0, min(cap, first * 2^failures)), so that nodes do not ask in step."""
    return draw() * min(MOST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 30))


class StorageFetch:
    """Puts a shard's verified content into a file. Safe to call from several threads."""

    def __init__(
        self,
        storage: Storage,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        count: Callable[[str, int], None] = lambda name, amount: None,
    ) -> None:
        """`storage` is the data folder; `count` is told storage_bytes and storage_requests as they happen."""
        self._url, self._clock, self._sleep, self._count = storage.url, clock, sleep, count
        self._fs, self._root = fsspec.core.url_to_fs(storage.url)

    def __call__(self, shard: ShardInfo, target: Path, deadline: Deadline) -> None:
        """Fetch into `target`, which is replaced.

        Raises DamagedShard when the content differs from the digest twice, FetchTimeout at the deadline, DataError
        when storage says that the shard does not exist or may not be read, OSError when the local disk is full.
        """
        for attempt in (1, 2):
            self.fetch(shard, target, deadline)
            actual = file_digest(str(target))
            if actual == shard.digest:
                return
            if attempt == 2:
                raise damaged(shard, self._url, actual)

    def fetch(self, shard: ShardInfo, target: Path, deadline: Deadline) -> None:
        """Fetch into `target` without looking at the content; raises as `__call__` but for DamagedShard."""
        failures, short = 0, 0
        last = "none"
        while True:
            if deadline.left() <= 0:
                raise FetchTimeout(
                    f"shard {shard.path}: {self._url}/{shard.path} did not arrive within {deadline.seconds:g} s "
                    f"({failures + short} tries; last error: {last}); check that the store answers, or raise "
                    "data.fetch_timeout_seconds"
                )
            error = self._transfer(shard, target, deadline)
            if error is None:
                size = target.stat().st_size
                if size >= shard.bytes or short + 1 >= SHORT_TRIES:
                    return
                short, last = short + 1, f"{size} of {shard.bytes} bytes arrived"
                continue
            kind = classify(error)
            if kind in ("disk", "unknown"):
                raise error
            if kind == "permanent":
                raise self._refused(shard, error) from error
            failures, last = failures + 1, f"{type(error).__name__}: {error}"
            self._sleep(min(backoff_seconds(failures - 1), deadline.left()))

    def _transfer(self, shard: ShardInfo, target: Path, deadline: Deadline) -> BaseException | None:
        """One try; the error that ended it, or None."""
        stall = min(STALL_SECONDS, deadline.seconds / 4)
        full, progress = f"{self._root}/{shard.path}", _Progress()
        self._count("storage_requests", 1)
        # A new file for each try: what a transfer that was given up still writes goes to the one it opened.
        target.unlink(missing_ok=True)
        try:
            future = self._start(full, target, progress, stall)
            while not future.done():
                seen = progress.bytes
                wait([future], timeout=min(stall, deadline.left()))
                if future.done():
                    break
                if deadline.left() <= 0 or progress.bytes == seen:
                    progress.abandoned.set()
                    if future.cancel():
                        progress.ended.wait(CANCEL_SECONDS)
                    return TimeoutError(f"{progress.bytes} of {shard.bytes} bytes after {stall:g} s without a new one")
            return future.exception()
        finally:
            self._count("storage_bytes", progress.bytes)

    def _start(self, full: str, target: Path, progress: _Progress, stall: float) -> Future:
        if self._fs.async_impl:
            return asyncio.run_coroutine_threadsafe(self._stream(full, target, progress, stall), self._fs.loop)
        future: Future = Future()
        file = target.open("xb")
        threading.Thread(
            target=self._copy, args=(full, file, progress, future), name="telar-fetch", daemon=True
        ).start()
        return future

    async def _stream(self, full: str, target: Path, progress: _Progress, stall: float) -> None:
        options: dict[str, Any] = {}
        if full.startswith(("http://", "https://")):
            import aiohttp

            # aiohttp allows 5 minutes for everything by default; the deadline is ours to watch.
            options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        try:
            await self._fs._get_file(full, str(target), callback=progress, **options)
        finally:
            progress.ended.set()

    def _copy(self, full: str, file: Any, progress: _Progress, future: Future) -> None:
        future.set_running_or_notify_cancel()
        try:
            with file, self._fs.open(full, "rb") as source:
                while chunk := source.read(COPY_BYTES):
                    progress.relative_update(len(chunk))
                    file.write(chunk)
        # The thread that waits on the future decides what to do with it.
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        else:
            future.set_result(None)
        progress.ended.set()

    def _refused(self, shard: ShardInfo, error: BaseException) -> DataError:
        if isinstance(error, FileNotFoundError):
            return missing(shard, self._url)
        return DataError(
            f"shard {shard.path}: {self._url}/{shard.path} may not be read ({type(error).__name__}: {error}); check "
            "the credentials and permissions of the storage"
        )


class _Progress(Callback):
    """Bytes that have arrived; ends a transfer that was given up at its next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.abandoned, self.ended = threading.Event(), threading.Event()

    def relative_update(self, inc: int = 1) -> None:
        if self.abandoned.is_set():
            raise TimeoutError("the transfer was given up")
        self.bytes += inc


def missing(shard: ShardInfo, url: str) -> DataError:
    """The error of a shard that is not there."""
    return DataError(
        f"shard {shard.path}: {url}/{shard.path} does not exist; run the prepare stage again, it makes what is missing"
    )


def damaged(shard: ShardInfo, url: str, actual: str) -> DamagedShard:
    """The error of a shard whose content is not what the manifest says."""
    return DamagedShard(
        f"shard {shard.path}: {url}/{shard.path} does not match its digest (manifest {shard.digest}, file {actual}); "
        "remove the file and run the prepare stage again"
    )
