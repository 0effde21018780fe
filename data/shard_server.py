"""One Ray actor per node that fills the node's cache of shards; ranks lease the copies and memory-map them.

Ranks need the actor only for shards that are not in the cache yet. When it has died they fetch by themselves into the
same folder, and come back to it when Ray has restarted it. Without Ray: `plain_opener`.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.storage import Storage
from configs.errors import DataError, TelarError
from configs.schema import RunConfig
from data.eviction import NextUses
from data.fetch import DamagedShard, Deadline, FetchTimeout
from data.manifest import Manifest, ShardInfo
from data.opener import CacheOpener, CacheSettings, cache_folder, plain_opener
from data.prefetch import Prefetcher
from data.quarantine import QuarantinedShard, shards_named, total_tokens
from data.shard_cache import AskAgain, Fetch, ShardCache
from data.shards import file_digest

NAMESPACE = "telar"
CALLS_AT_ONCE = 32
# Peers and the coordinator are answered even while all other calls wait for storage.
CONCURRENCY_GROUPS = {"control": 2, "peers": 4}
CHUNK_BYTES = 4 << 20
CHUNKS_AHEAD = 2
CHUNK_SECONDS = 30.0
COORDINATOR_SECONDS = 10.0
START_TIMEOUT_SECONDS = 120.0
# After a call to a dead actor, how long a rank fetches by itself before it tries the actor again.
RETRY_SECONDS = 2.0
COORDINATOR_RETRY_SECONDS = 5.0
POLL_SECONDS = 0.2
# What a rank waits longer than the server, whose own deadline gives the better error.
GRACE_SECONDS = 5.0
GAUGES = {
    "storage_bytes": "bytes of shards fetched from storage",
    "peer_bytes": "bytes of shards copied from other nodes",
    "hits": "shards found in the node's cache",
    "misses": "shards that had to be fetched",
    "evictions": "copies removed to make room",
    "damaged_copies": "cached copies that did not match their digest",
    "quarantined": "shards damaged in storage and masked",
}

__all__ = ["CacheOpener", "ServerOpener", "Servers", "ShardServer", "cache_folder", "plain_opener", "shard_opener"]


class ShardServer:
    """The actor's class. `path` answers when the copy is there; `prefetch` returns at once."""

    def __init__(self, settings: CacheSettings, folder: str | None, label: str, node: str) -> None:
        """`folder`: the cache folder; None for the default of this node."""
        self._settings, self._label, self._node = settings, label, node
        self._incarnation = uuid.uuid4().hex
        self._uses = NextUses()
        self._folder = folder or cache_folder()
        self._quarantined: dict[str, ShardInfo] = {}
        self._gauges: dict[str, Any] = {}
        self._found: Any = None
        self._alone_until = 0.0

    # Not in the constructor: an actor whose constructor raises dies, and the cause cannot be had from the error.
    @cached_property
    def _cache(self) -> ShardCache:
        return self._settings.cache(self._folder, self._uses, self._turn)

    @cached_property
    def _prefetcher(self) -> Prefetcher:
        return self._settings.prefetcher(self._cache, self._uses)

    def ready(self) -> str:
        """The cache folder, once the manifest is read; raises DataError when it cannot be."""
        Manifest.read(Storage(self._settings.storage_url), self._settings.data_folder)
        self._join()
        self._publish()
        return self._folder

    def ping(self) -> str:
        """A name of this start of the actor."""
        return self._incarnation

    def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    def path(self, shard: ShardInfo, seconds: float | None = None) -> str:
        """Path of a verified copy; raises QuarantinedShard, FetchTimeout (after `seconds`) or DataError naming it."""
        deadline = Deadline(self._cache.timeout_seconds if seconds is None else seconds)
        try:
            return self._cache.path(shard, deadline)
        except DamagedShard as error:
            # Local storage: there is no turn, and no other node has another copy.
            raise self._condemned(shard, str(error)) from error
        finally:
            self._publish()

    def used(self, shard: ShardInfo, reader: str) -> None:
        """A reader has leased the shard."""
        self._prefetcher.used(reader, shard)

    def released(self) -> None:
        """A reader has let go of a shard."""
        self._prefetcher.released()

    def prefetch(self, shards: Sequence[ShardInfo], reader: str) -> None:
        """Fetch shards in the background, in this order, as far as the cache has room that is not needed sooner."""
        self._prefetcher.announce(reader, shards)

    def condemn(self, shard: ShardInfo, reason: str) -> None:
        """Quarantine a shard; raises QuarantinedShard, or DataError past the budget."""
        raise self._condemned(shard, reason)

    def restore(self, shards: Sequence[ShardInfo]) -> None:
        """Quarantine what the run's state names; raises DataError past the budget."""
        self._quarantined |= {shard.path: shard for shard in shards}
        self._ask("restore", list(shards))

    def chunk(self, shard: ShardInfo, offset: int, size: int) -> bytes | None:
        """Some bytes of a verified copy, for another node; None when there is no copy."""
        held = self._cache.hold(shard)
        if held is None:
            return None
        try:
            with Path(held.path if held.descriptor is None else f"/dev/fd/{held.descriptor}").open("rb") as file:
                file.seek(offset)
                return file.read(size)
        finally:
            held.release()

    def statistics(self) -> dict[str, int]:
        """Bytes and requests to storage, bytes from other nodes, hits, misses, evictions, ... since the start."""
        return self._cache.statistics()

    def _join(self) -> None:
        import ray

        me = ray.get_runtime_context().current_actor
        self._ask("join", self._node, self._incarnation, me, self._cache.digests(), list(self._quarantined.values()))

    @property
    def _coordinator(self) -> Any:
        """The coordinator's handle, or None when it has ended for good."""
        import ray

        if self._found is None:
            try:
                # By name: a handle among the arguments of the constructor would have to outlive restarts.
                self._found = ray.get_actor(coordinator_name(self._label), namespace=NAMESPACE)
            except ValueError:
                return None
        return self._found

    @contextmanager
    def _turn(self, shard: ShardInfo, deadline: Deadline) -> Iterator[Fetch]:
        """Wait until this node may fetch the shard; say afterwards how it went."""
        source, peer = self._source(shard, deadline)
        has_it = False
        try:
            yield partial(self._copy, source.node, peer) if source.kind == "copy" else self._from_storage
            has_it = True
        finally:
            if source.kind != "alone":
                # Not waited for: a coordinator that is gone has forgotten the claim, too.
                self._coordinator.done.remote(shard.digest, self._node, self._incarnation, has_it)

    def _from_storage(self, shard: ShardInfo, target: Path, deadline: Deadline) -> None:
        """Fetch, under the lock of the shard: a thread that waited for it does not fetch again what is damaged."""
        if shard.path in self._quarantined:
            raise self._settings.quarantine().error(shard.path)
        try:
            self._cache.from_storage(shard, target, deadline)
        except DamagedShard as error:
            raise self._condemned(shard, str(error)) from error

    def _source(self, shard: ShardInfo, deadline: Deadline) -> tuple[Any, Any]:
        from data.coordinator import Source

        while True:
            left = deadline.left()
            try:
                answer = self._ask(
                    "source", shard, self._node, self._incarnation, left, seconds=left + COORDINATOR_SECONDS
                )
            except QuarantinedShard:
                self._quarantined[shard.path] = shard
                raise
            if answer is None:
                self._cache.count("without_coordinator", 1)
                return Source("alone"), None
            source, peer = answer
            if source.kind == "join":
                self._join()
            elif source.kind != "wait":
                return source, peer
            elif deadline.left() <= 0:
                raise FetchTimeout(
                    f"shard {shard.path}: node {source.node} has not fetched it within {deadline.seconds:g} s; raise "
                    "data.fetch_timeout_seconds, or see that node's log"
                )

    def _copy(self, node: str, peer: Any, shard: ShardInfo, target: Path, deadline: Deadline) -> None:
        """Copy a shard from another node's cache; raises AskAgain when that one has no good copy."""
        import ray

        from data.coordinator import GONE

        call = peer.chunk.options(concurrency_group="peers")
        offsets = iter(range(0, shard.bytes, CHUNK_BYTES))
        calls = [call.remote(shard, offset, CHUNK_BYTES) for offset in islice(offsets, CHUNKS_AHEAD)]
        try:
            with target.open("wb") as file:
                while calls:
                    chunk = ray.get(calls.pop(0), timeout=min(CHUNK_SECONDS, deadline.left()))
                    if chunk is None:
                        raise AskAgain
                    calls += [call.remote(shard, offset, CHUNK_BYTES) for offset in islice(offsets, 1)]
                    file.write(chunk)
                    self._cache.count("peer_bytes", len(chunk))
            if file_digest(str(target)) != shard.digest:
                raise AskAgain
        except (*GONE, AskAgain) as error:
            self._cache.count("peer_failures", 1)
            self._ask("lost", shard.digest, node)
            raise AskAgain from error

    def _condemned(self, shard: ShardInfo, reason: str) -> Exception:
        try:
            self._ask("quarantine", shard, reason)
        except QuarantinedShard as error:
            self._quarantined[shard.path] = shard
            return error
        # The coordinator is gone; its next start learns this when this server joins it.
        self._quarantined[shard.path] = shard
        quarantine = self._settings.quarantine()
        quarantine.restore(self._quarantined.values())
        return quarantine.error(shard.path, reason)

    def _ask(self, method: str, *arguments: Any, seconds: float = COORDINATOR_SECONDS) -> Any:
        """The coordinator's answer; raises the TelarError that it raises.

        None when it is gone. A call to an actor on a lost machine takes seconds to fail: it is left alone for a while.
        """
        if time.monotonic() < self._alone_until:
            return None
        coordinator = self._coordinator
        answer = coordinator and _answer(getattr(coordinator, method).remote(*arguments), seconds)
        if answer is None:
            self._alone_until = time.monotonic() + COORDINATOR_RETRY_SECONDS
        return answer

    def _publish(self) -> None:
        from ray.util.metrics import Gauge

        if not self._gauges:
            for name, meaning in GAUGES.items():
                self._gauges[name] = Gauge(f"telar_shards_{name}", description=meaning, tag_keys=("run", "node"))
                self._gauges[name].set_default_tags({"run": self._label, "node": self._node})
        counts = self._cache.statistics() | {"quarantined": len(self._quarantined)}
        for name, gauge in self._gauges.items():
            gauge.set(float(counts.get(name, 0)))


def _answer(call: Any, seconds: float) -> Any:
    """An actor's answer, or None when it is gone or does not answer in time; raises the TelarError that it raises."""
    import ray

    from data.coordinator import GONE

    try:
        return ray.get(call, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TelarError):
            raise error.cause from error
        raise
    except GONE:
        return None


def _slim(shard: ShardInfo) -> ShardInfo:
    """The shard without its list of record batches, which a server does not need."""
    return replace(shard, batches=()) if len(getattr(shard, "batches", ())) else shard


class ServerOpener(CacheOpener):
    """What a rank gives its Loader as `open_shard`: leases copies itself, asks this node's server for missing ones."""

    def __init__(self, server: Any, settings: CacheSettings, folder: str) -> None:
        """`folder` is the server's cache folder."""
        super().__init__(settings, folder)
        self._server = server
        self._alone_until = 0.0
        self._announced: list[ShardInfo] = []

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Announce shards that will be needed, in order of first use; does not wait."""
        self._announced = [_slim(shard) for shard in shards]
        self._server.prefetch.remote(self._announced, self._reader)

    def restore(self, shards: Sequence[ShardInfo]) -> None:
        """Quarantine what the run's state names, on all nodes."""
        super().restore(shards)
        if shards:
            _answer(self._server.restore.remote([_slim(shard) for shard in shards]), GRACE_SECONDS)

    def _obtain(self, shard: ShardInfo, deadline: Deadline) -> None:
        if time.monotonic() >= self._alone_until:
            if self._served(shard, deadline):
                return
            self._alone_until = time.monotonic() + RETRY_SECONDS
            self._cache.count("server_failures", 1)
        try:
            super()._obtain(shard, deadline)
        except DamagedShard:
            # Another node may have a good copy, and whether to mask the samples is decided for all: by the server.
            while not self._served(shard, deadline):
                if deadline.left() <= 0:
                    raise
                time.sleep(POLL_SECONDS)

    def _served(self, shard: ShardInfo, deadline: Deadline) -> bool:
        """Whether the server lives and has brought a copy; raises what it raises."""
        left = deadline.left()
        try:
            if _answer(self._server.path.remote(_slim(shard), left), left + GRACE_SECONDS) is None:
                return False
        except QuarantinedShard as error:
            self._quarantine.add(shard, str(error))
            raise
        if self._alone_until:
            # A server that was started anew knows nothing of what was announced.
            self._alone_until = 0.0
            self._server.prefetch.remote(self._announced, self._reader)
        return True

    def _condemn(self, shard: ShardInfo, reason: str) -> Exception:
        try:
            _answer(self._server.condemn.remote(_slim(shard), reason), GRACE_SECONDS)
        except QuarantinedShard:
            return self._quarantine.add(shard, reason)
        return super()._condemn(shard, reason)

    def _freed(self) -> None:
        self._server.released.remote()

    def _keep(self, shard: ShardInfo, held: Any) -> None:
        super()._keep(shard, held)
        if not self._cache.is_local:
            self._server.used.remote(_slim(shard), self._reader)


def coordinator_name(label: str) -> str:
    """Name of an attempt's coordinator actor."""
    return f"{label}/shards"


@dataclass(frozen=True)
class Servers:
    """Handles of an attempt's servers and their cache folders, both by node id, and the coordinator."""

    by_node: dict[str, Any]
    folders: dict[str, str]
    coordinator: Any
    settings: CacheSettings


def start_servers(
    config: RunConfig,
    storage: Storage,
    manifest: Manifest,
    label: str,
    folder_of: Callable[[str], str] | None = None,
    quarantined: Sequence[str] = (),
    leaving: Collection[str] = (),
) -> Servers:
    """Start the coordinator `LABEL/shards` and one server `LABEL/shards-N` on each node that is alive and stays.

    `folder_of` gives a cache folder per node id, for nodes that share a machine; `quarantined` are paths from the
    run's state; `leaving` are nodes that start no processes any more. Raises DataError when a server cannot read the
    manifest.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from data.coordinator import Coordinator

    settings = CacheSettings(
        storage.url,
        manifest.folder,
        total_tokens(manifest),
        config.data.cache_bytes,
        config.data.fetch_timeout_seconds,
        config.data.quarantine_fraction,
    )
    restored = [_slim(shard) for shard in shards_named(manifest, quarantined)]
    settings.quarantine().restore(restored)
    common: dict[str, Any] = {"namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    coordinator = (
        ray.remote(Coordinator)
        .options(
            name=coordinator_name(label),
            # With this process, whose end is the attempt's: no other machine's loss takes the coordinator along. It
            # takes a byte, since Ray puts actors that take nothing on any node, whatever a soft strategy says.
            memory=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
            **common,
        )
        .remote(settings.total_tokens, settings.quarantine_fraction, restored)
    )
    servers = Servers({}, {}, coordinator, settings)
    actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(ShardServer)
    try:
        for number, node in enumerate(nodes):
            servers.by_node[node] = actor.options(
                name=f"{label}/shards-{number}",
                max_concurrency=CALLS_AT_ONCE,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                **common,
            ).remote(settings, folder_of(node) if folder_of else None, label, node)
        ready = {node: server.ready.remote() for node, server in servers.by_node.items()}
        deadline = Deadline(START_TIMEOUT_SECONDS)
        for node, call in ready.items():
            folder = _answer(call, deadline.left())
            if folder is None:
                # Ray lists a machine as alive for some seconds after its loss; a rank there would name what is missing.
                ray.kill(servers.by_node.pop(node))
            else:
                servers.folders[node] = folder
    except BaseException:
        stop_servers(servers)
        raise
    return servers


def stop_servers(servers: Servers | None) -> None:
    """End the servers and the coordinator; their copies stay on disk for the next attempt. None is fine."""
    import ray

    if servers is not None:
        for actor in (*servers.by_node.values(), servers.coordinator):
            ray.kill(actor)


def shard_opener(servers: Servers) -> ServerOpener:
    """The opener of this process's node; raises DataError when no server was started there."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    if node not in servers.by_node:
        raise DataError(
            f"no shard server runs on node {node}: it joined the cluster after the attempt had started, or its server "
            f"did not start within {START_TIMEOUT_SECONDS:g} s (see the logs of its Ray workers); start the run again"
        )
    return ServerOpener(servers.by_node[node], servers.settings, servers.folders[node])
