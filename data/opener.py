"""What a Loader is given as `open_shard`: verified, leased local copies, with damaged shards quarantined by name."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import Storage
from configs.schema import DataSection
from data.eviction import NextUses
from data.fetch import DamagedShard, Deadline, FetchTimeout
from data.manifest import Manifest, ShardInfo
from data.prefetch import Prefetcher, reader_name
from data.quarantine import Quarantine, total_tokens
from data.shard_cache import DEFAULT_TIMEOUT_SECONDS, Held, ShardCache, Turn

DEFAULT_CACHE_BYTES = 16 * 2**30
DEFAULT_QUARANTINE_FRACTION = 0.001
# What a reader may have open of the cache: several ranks share it, and shards are fetched ahead besides.
LEASED_SHARE = 0.25
# Readers keep that many shards open; a lease beyond belongs to a map that is gone, or soon will be.
LEASES = 256
NUMBERS = itertools.count()


def cache_folder() -> str:
    """Where copies lie on this machine: TELAR_SHARD_CACHE, or a folder of this user below the temporary one."""
    default = str(Path(tempfile.gettempdir()) / f"telar-shards-{os.getuid()}")
    return os.environ.get("TELAR_SHARD_CACHE") or default


def cache_advice(storage: Storage, manifest: Manifest, data: DataSection) -> str | None:
    """What to set where the data are remote, larger than the cache, and a shard holds several blocks; else None.

    Blocks are shuffled over the whole corpus, so an epoch returns to a shard about once for each of its blocks.
    """
    token_bytes = 2 if manifest.vocabulary_size <= 1 << 16 else 4
    whole = sum(corpus.totals.source_tokens + corpus.totals.target_tokens for corpus in manifest.corpora) * token_bytes
    if storage.is_local or whole <= data.cache_bytes or data.shard_rows <= data.block_rows:
        return None
    shards = sum(len(corpus.shards) for corpus in manifest.corpora)
    times, fit = -(-data.shard_rows // data.block_rows), max(1, LEASED_SHARE * data.cache_bytes * shards // whole)
    return (
        f"the shards take {whole / 1e9:.1f} GB, a node's cache {data.cache_bytes / 1e9:.1f} GB: a shard is fetched up "
        f"to {times} times in an epoch. Raise data.cache_bytes; or have each fetched about once: data.block_rows equal "
        f"to data.shard_rows (now {data.block_rows} and {data.shard_rows}), and data.lanes x data.window_blocks (now "
        f"{data.lanes} x {data.window_blocks}), the shards in use at one time, at most {fit:.0f}"
    )


@dataclass(frozen=True)
class CacheSettings:
    """What a process needs to know to make its own cache of a data folder's shards; `data_folder` is in storage."""

    storage_url: str
    data_folder: str
    total_tokens: int
    cache_bytes: int = DEFAULT_CACHE_BYTES
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    quarantine_fraction: float = DEFAULT_QUARANTINE_FRACTION

    def cache(self, folder: str, uses: NextUses | None = None, turn: Turn | None = None) -> ShardCache:
        """A cache in that folder."""
        uses = uses or NextUses()
        return ShardCache(
            Storage(self.storage_url),
            self.data_folder,
            folder,
            self.cache_bytes,
            self.timeout_seconds,
            uses.next_use,
            turn,
        )

    def quarantine(self) -> Quarantine:
        """An empty quarantine with this run's budget."""
        return Quarantine(self.total_tokens, self.quarantine_fraction)

    def prefetcher(self, cache: ShardCache, uses: NextUses) -> Prefetcher:
        """A prefetcher that has at most a quarter of the cache in flight."""
        return Prefetcher(cache, uses, self.cache_bytes // 4)


class CacheOpener:
    """Opens shards through this process's own cache. Each path handed out is under a lease until `release`.

    The newest LEASES leases are kept; a process that ends loses all of them.
    """

    def __init__(self, settings: CacheSettings, folder: str) -> None:
        """`folder` is the cache folder; it is not used when storage is local."""
        self._settings, self._uses = settings, NextUses()
        self._cache = settings.cache(folder, self._uses)
        self._prefetcher = settings.prefetcher(self._cache, self._uses)
        self._quarantine = settings.quarantine()
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._reader = reader_name(next(NUMBERS))

    def __call__(self, shard: ShardInfo) -> str:
        """Path of a whole copy that this process has verified.

        Raises QuarantinedShard when the shard is damaged in storage and may be masked, DataError when damage exceeds
        `data.quarantine_fraction` or the shard is absent, FetchTimeout after `data.fetch_timeout_seconds`.
        """
        if shard.path in self._quarantine:
            raise self._quarantine.error(shard.path)
        deadline = Deadline(self._cache.timeout_seconds)
        while True:
            try:
                held = self._cache.hold(shard)
                if held is None:
                    self._obtain(shard, deadline)
                    held = self._cache.hold(shard)
            except DamagedShard as error:
                raise self._condemn(shard, str(error)) from error
            if held is not None:
                self._keep(shard, held)
                return held.path
            # Evicted, or found damaged, between being told and being leased.
            if deadline.left() <= 0:
                raise FetchTimeout(
                    f"shard {shard.path}: its copy was evicted or damaged again and again for {deadline.seconds:g} s "
                    "(data.fetch_timeout_seconds); raise data.cache_bytes, and check the disk of the cache"
                )

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Announce shards that will be needed, in order of first use; does not wait."""
        self._prefetcher.announce(self._reader, shards)

    @property
    def lease_bytes(self) -> int | None:
        """How many bytes of shards a reader should have open at most: what is open cannot be evicted.

        None where storage is local and nothing is cached.
        """
        return None if self._cache.is_local else int(LEASED_SHARE * self._settings.cache_bytes)

    def release(self, shard: ShardInfo) -> None:
        """The map of this shard is closed: its copy may be evicted. A shard that is not open is fine."""
        held = self._held.pop(shard.path, None)
        if held is not None:
            held.release()
            self._freed()

    def close(self) -> None:
        """Release all leases and stop fetching ahead."""
        self._prefetcher.close()
        while self._held:
            self._held.popitem()[1].release()

    def quarantined(self) -> list[str]:
        """Paths of shards that this opener knows to be quarantined, for the run's state."""
        return self._quarantine.state()

    def restore(self, shards: Sequence[ShardInfo]) -> None:
        """Quarantine what the run's state names (see `quarantine.shards_named`), before the first shard is opened."""
        self._quarantine.restore(shards)

    def statistics(self) -> dict[str, int]:
        """What this process's cache counted."""
        return self._cache.statistics()

    def _obtain(self, shard: ShardInfo, deadline: Deadline) -> None:
        """Bring a copy into the cache folder."""
        self._cache.path(shard, deadline)

    def _condemn(self, shard: ShardInfo, reason: str) -> Exception:
        """Quarantine a shard; the error to raise."""
        return self._quarantine.add(shard, reason)

    def _freed(self) -> None:
        """A lease has ended: what is fetched ahead may have room now."""
        self._prefetcher.released()

    def _keep(self, shard: ShardInfo, held: Held) -> None:
        self._prefetcher.used(self._reader, shard)
        if held.descriptor is None:
            return
        self.release(shard)
        self._held[shard.path] = held
        if len(self._held) > LEASES:
            self._held.popitem(last=False)[1].release()


def plain_opener(
    storage: Storage,
    manifest: Manifest,
    folder: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    quarantine_fraction: float = DEFAULT_QUARANTINE_FRACTION,
) -> CacheOpener:
    """An opener for a process without Ray: verifies local shards in place, copies others below `folder`."""
    settings = CacheSettings(
        storage.url,
        manifest.folder,
        total_tokens(manifest),
        cache_bytes,
        timeout_seconds,
        quarantine_fraction,
    )
    return CacheOpener(settings, folder or cache_folder())
