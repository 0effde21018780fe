"""What a cluster has: its nodes and their resources, asked over HTTP, and whether a run's ranks fit on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import CapacityError, ConfigError
from configs.schema import RunConfig


@dataclass(frozen=True)
class Node:
    """One living node; CPUs and GPUs are logical totals, whatever is in use."""

    address: str
    cpus: float
    gpus: float


def nodes_from_state(answer: Mapping[str, Any]) -> list[Node]:
    """Living nodes in the dashboard's answer to `/api/v0/nodes?detail=1`."""
    found = []
    for entry in answer["data"]["result"]["result"]:
        if entry["state"] == "ALIVE":
            total = entry.get("resources_total") or {}
            found.append(Node(entry["node_ip"], total.get("CPU", 0.0), total.get("GPU", 0.0)))
    return found


def check_capacity(config: RunConfig, nodes: Sequence[Node], where: str, embedded: bool) -> None:
    """Raise CapacityError, naming field and numbers, when the nodes can never hold all training ranks."""
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if any(node.gpus >= 1 for node in nodes) else "cpu"
    each, tensor = config.cluster.cpus_per_rank, config.parallelism.tensor
    ranks = config.min_replicas * config.parallelism.ranks_per_replica
    # Tensor ranks of a stage stand on one node.
    room = sum(_fits(node, each, device) // tensor for node in nodes) * tensor
    replicas = room // config.parallelism.ranks_per_replica
    if room >= ranks:
        return
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    have = f"{cpus:g} logical CPUs" + (f" and {gpus:g} GPUs" if device == "cuda" else "")
    needs = f"{ranks * each} CPUs" + (f" and {ranks} GPUs" if device == "cuda" else "")
    axes = [axis for axis in ("pipeline", "tensor") if getattr(config.parallelism, axis) > 1]
    lower = " or ".join(["lower cluster.cpus_per_rank", *(f"parallelism.{axis}" for axis in axes)])
    fix = f"set parallelism.data to {replicas}" if replicas else lower
    if embedded:
        fix += (
            f", or give the embedded cluster more logical CPUs: `telar down`, then submit with "
            f"--set cluster.local_cpus={ranks * each}"
        )
    else:
        fix += ", or add nodes"
    raise CapacityError(
        f"parallelism.data: {ranks} ranks of cluster.cpus_per_rank = {each} need {needs}"
        + (f", {tensor} ranks (parallelism.tensor) on one node" if tensor > 1 else "")
        + f"; {where} has {have} on "
        f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, room for {room} rank{'s' if room != 1 else ''}; {fix}"
    )


def check_storage_is_shared(config: RunConfig, nodes: Sequence[Node], storage_is_local: bool, embedded: bool) -> None:
    """Raise ConfigError when a local folder would be written by nodes that need not see the same folder."""
    if not storage_is_local or config.cluster.shared_filesystem or embedded or len(nodes) < 2:
        return
    raise ConfigError(
        f"run.storage: {config.run.storage!r} is a folder of one machine, the cluster has {len(nodes)} nodes; use an "
        "object store (s3://, gs://), or set cluster.shared_filesystem to true if every node mounts that folder"
    )


def _fits(node: Node, cpus_per_rank: int, device: str) -> int:
    by_cpus = int(node.cpus // cpus_per_rank)
    return min(by_cpus, int(node.gpus)) if device == "cuda" else by_cpus
