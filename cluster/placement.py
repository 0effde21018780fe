"""Placement groups of training ranks: one group per model replica, so that a replica starts whole or not at all.

A bundle holds the tensor ranks of one pipeline stage, which exchange activations in every layer: they stand on one
node. The stages of a replica, which hand on activations once, stand on as few nodes as there is room on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from configs.errors import CapacityError
from configs.schema import ParallelismSection, RunConfig


@dataclass(frozen=True)
class RankResources:
    """What Ray reserves for one rank, in logical CPUs and GPUs."""

    cpus: int
    gpus: int

    def bundle(self, ranks: int = 1) -> dict[str, float]:
        """The resources of so many ranks as a placement group's bundle."""
        return {"CPU": ranks * self.cpus, **({"GPU": ranks * self.gpus} if self.gpus else {})}


def rank_resources(config: RunConfig, totals: dict[str, float]) -> RankResources:
    """Resources of one rank; device auto takes a GPU where the cluster has any.

    Raises CapacityError naming the field, what is needed and what the cluster's nodes have in total.
    """
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if totals.get("GPU", 0) >= 1 else "cpu"
    wanted = RankResources(config.cluster.cpus_per_rank, 1 if device == "cuda" else 0)
    each_replica = config.parallelism.ranks_per_replica
    ranks = config.min_replicas * each_replica
    for name, each, field in (("CPU", wanted.cpus, "cpus_per_rank"), ("GPU", wanted.gpus, "device: cuda")):
        have = int(totals.get(name, 0))
        if each and not have:
            raise CapacityError(
                f"cluster.device: the run asks for {name}s and the cluster has none; set cluster.device to cpu or add "
                "nodes that have them"
            )
        if ranks * each > have:
            size = "parallelism.data" if config.elastic.min_replicas is None else "elastic.min_replicas"
            raise CapacityError(
                f"{size}: {ranks} ranks x {each} {name} (cluster.{field}) need {ranks * each} {name}s, the "
                f"cluster has {have}; set {size} to {max(1, have // (each * each_replica))} or add nodes"
                + ("; on the embedded cluster raise cluster.local_cpus" if name == "CPU" else "")
            )
    return wanted


def reserve(
    resources: RankResources, replicas: int, parallelism: ParallelismSection, label: str, timeout_seconds: float
) -> list[PlacementGroup]:
    """Reserve one group per replica; raises CapacityError, with nothing kept, when they are not free in time."""
    stages, bundle = parallelism.pipeline, resources.bundle(parallelism.tensor)
    groups = [placement_group([bundle] * stages, strategy="PACK", name=f"{label}/dp{i}") for i in range(replicas)]
    deadline = time.monotonic() + timeout_seconds
    ready = sum(group.wait(max(0.1, deadline - time.monotonic())) for group in groups)
    if ready < replicas:
        release(groups)
        wanted = f"{bundle} free on one node" if stages == 1 else f"{stages} x {bundle} free, each on one node,"
        raise CapacityError(
            f"only {ready} of {replicas} replicas found {wanted} within {timeout_seconds:.0f} s; "
            f"available now: {_short(ray.available_resources())}; stop other work on the cluster or lower "
            "parallelism.data or elastic.min_replicas"
        )
    return groups


def nodes_of(group: PlacementGroup, parallelism: ParallelismSection) -> list[str]:
    """The node of each rank of a group that is reserved: of each stage's bundle, for each tensor rank in it."""
    by_bundle = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return [by_bundle[bundle] for bundle in sorted(by_bundle) for _ in range(parallelism.tensor)]


def release_left(prefix: str) -> None:
    """Give back the groups whose names begin so: those of a process that is gone stay reserved if Ray restarts it."""
    for entry in ray.util.placement_group_table().values():
        if entry["name"].startswith(prefix) and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(entry["placement_group_id"]))))


def release(groups: list[PlacementGroup]) -> None:
    """Give the reservations back."""
    for group in groups:
        remove_placement_group(group)


def _short(resources: dict[str, float]) -> str:
    return ", ".join(f"{name} {resources[name]:g}" for name in ("CPU", "GPU") if name in resources) or "none"
