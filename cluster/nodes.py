"""Which nodes of the cluster live, which of them will leave, and how many replicas fit into what is free on them."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping

import ray
import ray._private.state

from cluster.placement import RankResources
from configs.schema import ParallelismSection

PROBE_SECONDS = 1.0


def living_nodes() -> set[str]:
    """Ids of the nodes that Ray lists as alive and whose raylet does not refuse connections.

    Ray lists a lost node as alive until its health check has failed some times; the machine of a raylet that was killed
    refuses connections to it at once. For a machine that is gone, and a raylet that hangs, Ray's list decides.
    """
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and not _refuses(node)}


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray was told to drain: they live, will be gone soon and take nothing new."""
    return set(ray._private.state.state.get_draining_nodes())


def _refuses(node: Mapping[str, object]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_SECONDS):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        # Slow or out of reach: that may pass, and Ray finds out.
        return False


def free_resources() -> dict[str, dict[str, float]]:
    """What nobody has reserved, by node id; a snapshot that lags some tenths of a second behind."""
    return ray._private.state.available_resources_per_node()


def replicas_that_fit(
    resources: RankResources,
    parallelism: ParallelismSection,
    free: Mapping[str, Mapping[str, float]],
    nodes: Collection[str],
) -> int:
    """Replicas that find room on these nodes, the tensor ranks of each of their stages on one of them."""
    stages = sum(_ranks(resources, free[node]) // parallelism.tensor for node in nodes if node in free)
    return stages // parallelism.pipeline


def _ranks(resources: RankResources, free: Mapping[str, float]) -> int:
    # Ray counts in ten-thousandths, so 2 CPUs minus 1 can be a hair below 1.
    bundle = resources.bundle()
    return min(int(free.get(name, 0.0) / each + 1e-4) for name, each in bundle.items())
