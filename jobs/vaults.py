"""The vaults of a run as its controller sees them: begun for each attempt, asked for what they hold, taken over."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.commit import attempt_folder
from configs.errors import StorageError
from jobs.vault import COPY_SECONDS, Snapshot, Vault, newest, transfer_seconds

NAMESPACE = "telar"
START_SECONDS = 30.0
CALLS_AT_ONCE = 16
# Copies have threads of their own: those that wait for another node's vault may be all others, there as here.
COPIES_AT_ONCE = 4
NAME = "vault-"


class Vaults:
    """The vaults of a run, one for each node that has held a rank."""

    def __init__(self, run: str) -> None:
        self._run = run
        self.by_node: dict[str, Any] = {}

    def take_over(self, living: Collection[str], attempt: int) -> None:
        """Have the vaults of a controller before this one, and have them refuse parts of attempts before `attempt`."""
        for name, vault in self._left():
            node = name.rsplit(NAME, 1)[1]
            try:
                ray.get(vault.begin.remote(attempt, None), timeout=COPY_SECONDS)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                continue
            if node in living and node not in self.by_node:
                self.by_node[node] = vault

    def remove_left(self) -> None:
        """End what a controller before this one left: this one's run begins with what is in storage."""
        for _, vault in self._left():
            ray.kill(vault)

    def _left(self) -> list[tuple[str, Any]]:
        """Names and handles of this run's vaults, those of the latest attempt first."""
        mine = [
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{self._run}/attempt-")
        ]
        found = []
        for name in sorted((name for name in mine if f"/{NAME}" in name), key=_attempt, reverse=True):
            try:
                found.append((name, ray.get_actor(name, namespace=NAMESPACE)))
            except ValueError:
                # It has ended since.
                continue
        return found

    def begin(self, attempt: int, nodes: Collection[str]) -> None:
        """Have a vault on each of these nodes, each the peer of the one before, for a new attempt."""
        for node in set(nodes) - self.by_node.keys():
            vault = self.by_node[node] = (
                ray.remote(concurrency_groups={"copies": COPIES_AT_ONCE})(Vault)
                .options(
                    name=f"{self._run}/attempt-{attempt}/{NAME}{node}",
                    namespace=NAMESPACE,
                    lifetime="detached",
                    num_cpus=0,
                    max_concurrency=CALLS_AT_ONCE,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                )
                .remote()
            )
            vault.serve.remote(f"{self._run}/controller")
        ring = [self.by_node[node] for node in sorted(nodes)]
        peers = [*ring[1:], ring[0]] if len(ring) > 1 else [None]
        ray.get(
            [vault.begin.remote(attempt, peer) for vault, peer in zip(ring, peers, strict=True)], timeout=START_SECONDS
        )

    def newest(self, living: Collection[str]) -> Snapshot | None:
        """The newest whole snapshot that is held on living nodes; vaults on others are given up."""
        for node in self.by_node.keys() - set(living):
            ray.kill(self.by_node.pop(node))
        offers = []
        for node, answer in [(node, vault.parts.remote()) for node, vault in self.by_node.items()]:
            try:
                offers.append((self.by_node[node], ray.get(answer, timeout=COPY_SECONDS)))
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayActorError:
                # Its process is gone, the node is not: the next attempt has a new one there.
                ray.kill(self.by_node.pop(node))
        return newest(offers)

    def write(self, snapshot: Snapshot, checkpoints_url: str, attempt: int) -> None:
        """Have all parts written to storage as files of this attempt; raises StorageError naming what is missing."""
        folder = attempt_folder(snapshot.step, attempt)
        waiting = [(part, list(holders)) for part, holders in zip(snapshot.parts, snapshot.holders, strict=True)]
        said = "their digests do not match"
        while waiting:
            calls = [(part, left, left.pop().write.remote(part.key, checkpoints_url, folder)) for part, left in waiting]
            waiting = []
            for part, left, call in calls:
                try:
                    if ray.get(call, timeout=transfer_seconds(part)):
                        continue
                except ray.exceptions.RayError as error:
                    said = str(getattr(error, "cause", None) or error)
                if not left:
                    raise StorageError(f"part {part.file.rank} of step {snapshot.step} could not be written: {said}")
                waiting.append((part, left))

    def forget(self, step: int) -> None:
        """Never start from this step's snapshots again."""
        calls = [vault.forget.remote(step) for vault in self.by_node.values()]
        ray.wait(calls, num_returns=len(calls), timeout=COPY_SECONDS)

    def close(self) -> None:
        """Let everything go."""
        for vault in self.by_node.values():
            ray.kill(vault)
        self.by_node.clear()


def unwritten(snapshot: Snapshot | None) -> Sequence[Mapping[str, Any]]:
    """Records of steps up to the snapshot's that were not in storage when it was made; see `jobs.rank`."""
    return snapshot.parts[0].extra.get("records", ()) if snapshot is not None else ()


def _attempt(name: str) -> int:
    return int(name.split("/attempt-")[1].split("/")[0])
