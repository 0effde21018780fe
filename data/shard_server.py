"""One Ray actor per node that keeps verified local copies of shards; ranks ask it for paths and memory-map them.

Without Ray (`plain_opener`) each process looks after its own copies, in the same folder layout.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.storage import Storage
from configs.errors import DataError, TelarError
from configs.schema import RunConfig
from data.manifest import Manifest, ShardInfo
from data.shard_cache import ShardCache

DEFAULT_CACHE_BYTES = 16 * 2**30
PREFETCH_THREADS = 2
CALLS_AT_ONCE = 8
START_TIMEOUT_SECONDS = 120.0

# Actor handles by node id.
Servers = dict[str, Any]


def cache_folder() -> str:
    """Where this user's copies lie on this machine; data of different digests lie in folders of their own."""
    return str(Path(tempfile.gettempdir()) / f"telar-shards-{os.getuid()}")


class ShardServer:
    """The actor's class. `path` answers when the copy is there; `prefetch` returns at once."""

    def __init__(self, storage_url: str, data_folder: str, cache_bytes: int) -> None:
        self._storage_url, self._data_folder, self._cache_bytes = storage_url, data_folder, cache_bytes
        self._lock = threading.Lock()
        self._opened: ShardCache | None = None
        self._pool = ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="prefetch")

    def _cache(self) -> ShardCache:
        # Not in the constructor: an actor whose constructor raises dies, and the cause cannot be had from the error.
        with self._lock:
            if self._opened is None:
                storage = Storage(self._storage_url)
                manifest = Manifest.read(storage, self._data_folder)
                self._opened = ShardCache(storage, manifest, cache_folder(), self._cache_bytes)
            return self._opened

    def ready(self) -> bool:
        """True, once the manifest is read; raises DataError when it cannot be."""
        return self._cache() is not None

    def path(self, shard: ShardInfo) -> str:
        """Local path of a verified copy; raises DataError naming the shard."""
        return self._cache().path(shard)

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Fetch shards in the background, in this order, as far as they fill half of the cache.

        A shard that fails here is tried again, and its error raised, when it is asked for.
        """
        room = self._cache_bytes // 2
        for shard in shards:
            room -= shard.bytes
            if room < 0:
                return
            self._pool.submit(self._cache().path, shard)

    def statistics(self) -> dict[str, int]:
        """Bytes fetched from storage so far."""
        return {"fetched_bytes": self._cache().fetched_bytes}


class ServerOpener:
    """Asks this node's server; what a rank gives its Loader as `open_shard`."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def __call__(self, shard: ShardInfo) -> str:
        """Local path of a verified copy; raises the server's DataError."""
        import ray

        try:
            return ray.get(self._server.path.remote(shard))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TelarError):
                raise error.cause from error
            raise

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Announce shards that will be needed; does not wait."""
        self._server.prefetch.remote(list(shards))


def start_servers(config: RunConfig, storage: Storage, manifest: Manifest, label: str) -> Servers:
    """Start one server on each node that is alive, named `LABEL/shards-N`; returns handles by node id.

    Raises DataError when a server cannot read the manifest.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor = ray.remote(ShardServer)
    servers: Servers = {}
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    try:
        for number, node in enumerate(nodes):
            servers[node] = actor.options(
                name=f"{label}/shards-{number}",
                namespace="telar",
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=CALLS_AT_ONCE,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(storage.url, manifest.folder, config.data.cache_bytes)
        ray.get([server.ready.remote() for server in servers.values()], timeout=START_TIMEOUT_SECONDS)
    except BaseException as error:
        stop_servers(servers)
        cause = getattr(error, "cause", None)
        if isinstance(cause, TelarError):
            raise cause from error
        raise
    return servers


def stop_servers(servers: Servers | None) -> None:
    """End the servers; their copies stay on disk for the next attempt. None is fine."""
    import ray

    for server in (servers or {}).values():
        ray.kill(server)


def shard_opener(servers: Servers) -> ServerOpener:
    """The opener of this process's node; raises DataError when no server was started there."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    if node not in servers:
        raise DataError(f"no shard server runs on node {node}; it joined the cluster after the attempt had started")
    return ServerOpener(servers[node])


def plain_opener(
    storage: Storage, manifest: Manifest, folder: str | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
) -> Callable[[ShardInfo], str]:
    """An opener for a process without Ray: verifies local shards in place, copies others below `folder`."""
    return ShardCache(storage, manifest, folder or cache_folder(), cache_bytes).path
