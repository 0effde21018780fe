"""Snapshots of training state in the memory of the cluster's nodes: the newest steps, each on two nodes.

A `Vault` is an actor of one node. A rank hands its part of a snapshot to its node's vault, which keeps it as bytes of
its own and passes a copy on to another node's before it answers. The rank computes the next step's gradients meanwhile,
and no rank updates its weights before all have had their answers. So when a step is done anywhere, the snapshot of the
step before lies twice; what a crash of all nodes, or of both that hold a part, takes away is in storage, as of the last
commit. A snapshot counts when the parts of all ranks of one attempt are there; digests are checked by who restores it.

Vaults are detached actors: when the controller's process dies, they keep what they hold for the one that Ray starts in
its place. Where there is no controller any more, they leave by themselves.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import xxhash

from cluster.commit import Committed, RankFile, attempt_folder
from cluster.storage import Storage

# An attempt's ranks are at most one step apart, so that they have one of the last two in common.
KEPT = 2
COPY_SECONDS = 5.0
# How often a vault looks whether there still is a controller.
CONTROLLER_SECONDS = 15.0
SLOWEST_BYTES_PER_SECOND = 20e6


class Key(NamedTuple):
    """Which part of which snapshot."""

    attempt: int
    step: int
    rank: int


@dataclass(frozen=True)
class Part:
    """One rank's part of a snapshot as the rank described it; `extra` is what the commit of the step would hold."""

    step: int
    attempt: int
    world_size: int
    file: RankFile
    extra: dict[str, Any]

    @property
    def key(self) -> Key:
        """Its name."""
        return Key(self.attempt, self.step, self.file.rank)


class StaleAttempt(Exception):
    """A part came from an attempt that is over."""


class Shelf:
    """What one vault holds: parts with their bytes."""

    def __init__(self) -> None:
        self._held: dict[Key, tuple[Part, bytes]] = {}
        self._attempt = 0

    def begin(self, attempt: int) -> None:
        """From now on parts of earlier attempts are refused; those that are held stay until they are outdated."""
        self._attempt = max(self._attempt, attempt)

    def keep(self, part: Part, content: bytes) -> None:
        """Keep a part, and the one before it; raises StaleAttempt."""
        if part.attempt < self._attempt:
            raise StaleAttempt(f"attempt {part.attempt} is over, attempt {self._attempt} trains")
        self._held[part.key] = (part, content)
        mine = sorted(key for key in self._held if key.rank == part.file.rank and key.attempt == part.attempt)
        outdated = mine[:-KEPT]
        if len(mine) >= KEPT:
            # The second part of an attempt: all its ranks have delivered the first, and so it can be started from.
            outdated += [key for key in self._held if key.attempt < part.attempt]
        for key in outdated:
            del self._held[key]

    def forget(self, step: int) -> None:
        """Never offer this step again."""
        self._held = {key: held for key, held in self._held.items() if key.step != step}

    def parts(self) -> list[Part]:
        """Everything that is held."""
        return [part for part, _ in self._held.values()]

    def content(self, key: Key) -> bytes | None:
        """The bytes of a part, if it is held."""
        held = self._held.get(key)
        return held[1] if held is not None else None


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot: all its parts, and the vaults that hold each, by rank."""

    parts: tuple[Part, ...]
    holders: tuple[tuple[Any, ...], ...]

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return self.parts[0].step

    def extra(self) -> dict[str, Any]:
        """What the manifest of a commit of this step says beside the files."""
        first = self.parts[0].extra
        quarantined = sorted({path for part in self.parts for path in part.extra["data_state"]["quarantined"]})
        told = {name: value for name, value in first.items() if name != "records"}
        return {**told, "data_state": {**first["data_state"], "quarantined": quarantined}}

    def committed(self) -> Committed:
        """What `cluster.commit` would return, had the snapshot been committed in storage."""
        first = self.parts[0]
        manifest = {
            "step": first.step,
            "attempt": first.attempt,
            "world_size": first.world_size,
            "files": [vars(part.file) for part in self.parts],
            **self.extra(),
        }
        return Committed(first.step, first.attempt, attempt_folder(first.step, first.attempt), manifest, "")


def newest(offers: Iterable[tuple[Any, Sequence[Part]]]) -> Snapshot | None:
    """The newest whole snapshot of what vaults (handle, parts) hold; of one step, that of the latest attempt."""
    found: dict[tuple[int, int], dict[int, tuple[Part, list[Any]]]] = defaultdict(dict)
    for vault, parts in offers:
        for part in parts:
            found[part.step, part.attempt].setdefault(part.file.rank, (part, []))[1].append(vault)
    for place in sorted(found, reverse=True):
        ranks = found[place]
        if len(ranks) == next(iter(ranks.values()))[0].world_size:
            ordered = [ranks[rank] for rank in sorted(ranks)]
            return Snapshot(tuple(part for part, _ in ordered), tuple(tuple(vaults) for _, vaults in ordered))
    return None


class Vault:
    """The actor's class; calls come from several threads."""

    def __init__(self) -> None:
        self._shelf, self._lock = Shelf(), threading.Lock()
        self._peer: Any = None

    def serve(self, controller: str) -> None:
        """End this process when there is no actor of that name any more: nobody else would remove it."""

        def watch() -> None:
            while True:
                time.sleep(CONTROLLER_SECONDS)
                try:
                    ray.get_actor(controller, namespace="telar")
                except ValueError:
                    os._exit(0)
                except ray.exceptions.RayError:
                    # Ray's own server may be away for a while.
                    continue

        threading.Thread(target=watch, name="controller-watch", daemon=True).start()

    def begin(self, attempt: int, peer: Any) -> None:
        """A new attempt; `peer` is the vault of another node, or None where there is none."""
        with self._lock:
            self._shelf.begin(attempt)
            self._peer = peer

    def deliver(self, part: Part, content: bytes | np.ndarray) -> bool:
        """Keep a part and have the peer keep it; whether there are two now. Raises StaleAttempt."""
        self.keep(part, content)
        if self._peer is None:
            return False
        try:
            kept = self._peer.keep.options(concurrency_group="copies").remote(part, content)
            ray.get(kept, timeout=transfer_seconds(part))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return False
        return True

    def keep(self, part: Part, content: bytes | np.ndarray) -> None:
        """Keep a part here."""
        owned = _own(content)
        with self._lock:
            self._shelf.keep(part, owned)

    def parts(self) -> list[Part]:
        """What is held."""
        with self._lock:
            return self._shelf.parts()

    def content(self, key: Key) -> bytes | None:
        """The bytes of a part."""
        with self._lock:
            return self._shelf.content(key)

    def write(self, key: Key, checkpoints_url: str, folder: str) -> bool:
        """Write a part below the checkpoints' folder as its rank would have; False without it, or if it is damaged.

        Raises StorageError.
        """
        content = self.content(key)
        with self._lock:
            files = [part.file for part in self._shelf.parts() if part.key == key]
        if content is None or not files or xxhash.xxh3_128_hexdigest(content) != files[0].digest:
            return False
        Storage(checkpoints_url).write_bytes(f"{folder}/{files[0].path}", content)
        return True

    def forget(self, step: int) -> None:
        """Never offer this step again."""
        with self._lock:
            self._shelf.forget(step)


def transfer_seconds(part: Part) -> float:
    """How long a part may take from one node to another."""
    return COPY_SECONDS + part.file.bytes / SLOWEST_BYTES_PER_SECOND


def _own(content: bytes | np.ndarray) -> bytes:
    """Memory of this process: what Ray hands in may belong to the sender, and go with it."""
    return bytes(memoryview(content))


def fetch(snapshot: Snapshot, own: Any, folder: str) -> tuple[Storage, Committed]:
    """The parts of a snapshot as files below `folder`, from this node's vault (`own`) where it has them."""
    storage, committed = Storage(folder), snapshot.committed()
    for part, holders in zip(snapshot.parts, snapshot.holders, strict=True):
        for vault in sorted(holders, key=lambda holder: holder != own):
            try:
                content = ray.get(vault.content.remote(part.key), timeout=transfer_seconds(part))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                continue
            if content is not None:
                storage.write_bytes(f"{committed.folder}/{part.file.path}", content)
                break
    return storage, committed
