"""The processes of a run's training ranks, over all its attempts: reserved room, ranks, and standbys that wait.

Of an attempt that failed, the processes that left by themselves are ranks of the next one, and a standby takes the
place of one that is gone: either has imported everything already, which takes longer than all else in a recovery.
Processes on GPUs are not used twice, since an error can leave a device's context unusable; there are no standbys then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.nodes import free_resources, replicas_that_fit
from cluster.placement import RankResources, nodes_of, release, reserve
from configs.schema import RunConfig
from jobs.worker import Place, TrainWorker

ANSWER_SECONDS = 2.0


class NotReady(Exception):
    """A process did not come up."""


@dataclass(eq=False)
class Process:
    """A training process; `place` is known once it is ready."""

    actor: Any
    node: str
    ready: ray.ObjectRef
    place: Place | None = None


@dataclass(eq=False)
class _Replica:
    group: PlacementGroup
    # Of each rank, in the order of ranks.
    nodes: list[str]
    processes: list[Process | None] = field(default_factory=list)


class Crew:
    """All training processes of one run."""

    def __init__(self, config: RunConfig, resources: RankResources, operators: Callable[[], str]) -> None:
        """`operators`: what `prepare` of a process is to be told."""
        self._config, self._resources, self._operators = config, resources, operators
        self._parallelism = config.parallelism
        self._replicas: list[_Replica] = []
        self._spare: dict[str, list[Process]] = defaultdict(list)
        self._spawned = 0

    @property
    def nodes(self) -> set[str]:
        """Nodes that hold a rank."""
        return {node for replica in self._replicas for node in replica.nodes}

    @property
    def processes(self) -> list[Process]:
        """The ranks' processes in the order of ranks, which have been assembled."""
        found = [process for replica in self._replicas for process in replica.processes]
        assert all(process is not None for process in found)
        return found

    @property
    def manned(self) -> list[Process]:
        """The ranks' processes that there are."""
        return [process for replica in self._replicas for process in replica.processes if process is not None]

    def room(self, living: Collection[str]) -> int:
        """Replicas that could train now: those whose room on living nodes is reserved, and what is free."""
        held = sum(replica_lives(replica.nodes, living) for replica in self._replicas)
        return held + replicas_that_fit(self._resources, self._parallelism, free_resources(), living)

    def release_lost(self, living: Collection[str]) -> None:
        """Give back the room of replicas that lost a node: Ray would move it to nodes that are free."""
        for replica in list(self._replicas):
            if not replica_lives(replica.nodes, living):
                self._give_up(replica, living)

    def assemble(self, replicas: int, living: Collection[str], label: str, timeout_seconds: float) -> None:
        """Reserve room for so many replicas and give each rank a process.

        Raises CapacityError when there is no room in time; what was reserved before stays.
        """
        for replica in list(self._replicas):
            kept = len(self._replicas) <= replicas or self._replicas.index(replica) < replicas
            if not kept or not replica_lives(replica.nodes, living):
                self._give_up(replica, living)
        for node in set(self._spare) - set(living):
            del self._spare[node]
        missing = replicas - len(self._replicas)
        if missing > 0:
            groups = reserve(self._resources, missing, self._parallelism, label, timeout_seconds)
            for group in groups:
                nodes = nodes_of(group, self._parallelism)
                self._replicas.append(_Replica(group, nodes, [None] * len(nodes)))
        for replica in self._replicas:
            for number, process in enumerate(replica.processes):
                if process is None or not _answers(process):
                    replica.processes[number] = self._take(replica, number, label)

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Wait until the ranks' processes have imported everything; raises NotReady or RayError."""
        processes = self.processes
        _, late = ray.wait([p.ready for p in processes], num_returns=len(processes), timeout=timeout_seconds)
        if late:
            raise NotReady(f"{len(late)} of {len(processes)} processes were not ready within {timeout_seconds} s")
        for process in processes:
            process.place = ray.get(process.ready)

    def dismiss(self, leaving: Collection[Process]) -> None:
        """End these ranks' processes, by Ray's means: one that is stopped does not hear it."""
        for replica in self._replicas:
            replica.processes = [None if process in leaving else process for process in replica.processes]
        for process in leaving:
            ray.kill(process.actor)

    def stand_by(self, label: str) -> None:
        """Start the standbys that are missing on the nodes that hold a rank."""
        for node in () if self._resources.gpus else self.nodes:
            while len(self._spare[node]) < self._config.elastic.standbys:
                self._spare[node].append(self._spawn(node, None, 0, label))

    def close(self) -> None:
        """End everything and give the room back."""
        for replica in list(self._replicas):
            for process in replica.processes:
                if process is not None:
                    ray.kill(process.actor)
            release([replica.group])
        self._replicas = []
        for process in (process for waiting in self._spare.values() for process in waiting):
            ray.kill(process.actor)
        self._spare.clear()

    def _give_up(self, replica: _Replica, living: Collection[str]) -> None:
        self._replicas.remove(replica)
        for process in replica.processes:
            if process is None:
                continue
            if process.node in living and not self._resources.gpus:
                self._spare[process.node].append(process)
            else:
                ray.kill(process.actor)
        release([replica.group])

    def _take(self, replica: _Replica, number: int, label: str) -> Process:
        node = replica.nodes[number]
        while self._spare[node]:
            process = self._spare[node].pop(0)
            if _answers(process):
                return process
        return self._spawn(node, replica.group, number // self._parallelism.tensor, label)

    def _spawn(self, node: str, group: PlacementGroup | None, bundle: int, label: str) -> Process:
        environment = {"OMP_NUM_THREADS": str(self._config.train.threads_per_rank)}
        variables = dict(environment)
        if self._resources.gpus:
            strategy: Any = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            takes = {"num_cpus": self._resources.cpus, "num_gpus": self._resources.gpus}
        else:
            # The group holds the CPUs; the process only has to be where they are, so that a standby can take over.
            environment["DS_ACCELERATOR"] = "cpu"
            strategy, takes = NodeAffinitySchedulingStrategy(node, soft=False), {"num_cpus": 0}
        self._spawned += 1
        actor = TrainWorker.options(
            name=f"{label}/process-{self._spawned}",
            namespace="telar",
            scheduling_strategy=strategy,
            runtime_env={"env_vars": variables},
            **takes,
        ).remote(environment)
        return Process(actor, node, actor.prepare.remote(self._operators()))


def replica_lives(nodes: Collection[str], living: Collection[str]) -> bool:
    """Whether all nodes of a replica are among those that live."""
    return set(nodes) <= set(living)


def _answers(process: Process) -> bool:
    """Whether the process is alive, as far as Ray knows; one that is still importing is."""
    if process.place is None and not ray.wait([process.ready], timeout=0)[0]:
        return True
    done, _ = ray.wait([process.actor.beat.remote()], timeout=ANSWER_SECONDS)
    if not done:
        return False
    try:
        ray.get(done[0])
    except ray.exceptions.RayError:
        return False
    return True
