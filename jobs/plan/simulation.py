"""A run against failures, event by event: training, checkpoints, lost nodes, recoveries, repairs.

Every node fails on its own clock (exponential), so that thousands of nodes are thousands of clocks. A spare node takes
the failed one's place; where none is left the run waits for the first repair. Nothing here uses the closed form of
`checkpoints.py`, which the tests compare it with.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from jobs.plan.checkpoints import CheckpointCost

# A node that is rebooted or swapped by hand: hours, not minutes.
REPAIR_SECONDS = 4 * 3600.0


@dataclass
class Simulation:
    """What happened in `horizon` seconds of wall time; all in seconds.

    `path` holds (wall time, progress) where either bends: progress falls where a failure takes it back.
    """

    horizon: float
    nodes: int
    progress: float = 0.0
    checkpoints: int = 0
    stalled: float = 0.0
    lost: float = 0.0
    restarting: float = 0.0
    waiting: float = 0.0
    failure_times: list[float] = field(default_factory=list)
    path: list[tuple[float, float]] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Progress that was kept, over wall time."""
        return self.progress / self.horizon

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers; times in seconds."""
        return {
            "horizon_seconds": self.horizon,
            "nodes": self.nodes,
            "goodput": self.goodput,
            "progress_seconds": self.progress,
            "failures": len(self.failure_times),
            "checkpoints": self.checkpoints,
            "stalled_seconds": self.stalled,
            "lost_seconds": self.lost,
            "restarting_seconds": self.restarting,
            "waiting_seconds": self.waiting,
        }


class _Nodes:
    """The clocks of a run's nodes, the spares, and the nodes in repair."""

    def __init__(self, nodes: int, mean: float, spares: int | None, repair: float, seed: int) -> None:
        self._random, self._mean, self._spares, self._repair = random.Random(seed), mean, spares, repair
        self._clocks = [self._random.expovariate(1 / mean) for _ in range(nodes)]
        heapq.heapify(self._clocks)
        self._repairs: list[float] = []

    def next_failure(self, now: float) -> float:
        """When the next node fails that works from `now` on; those that would have failed before had nothing to do."""
        while self._clocks[0] < now:
            heapq.heapreplace(self._clocks, now + self._random.expovariate(1 / self._mean))
        return self._clocks[0]

    def replace(self, now: float) -> float:
        """The node that failed at `now` goes into repair; returns when another stands in its place."""
        ready = now
        if self._spares is not None:
            heapq.heappush(self._repairs, now + self._repair)
            while self._repairs[0] <= now:
                heapq.heappop(self._repairs)
                self._spares += 1
            if self._spares:
                self._spares -= 1
            else:
                ready = heapq.heappop(self._repairs)
        heapq.heapreplace(self._clocks, ready + self._random.expovariate(1 / self._mean))
        return ready


def simulate(
    horizon: float,
    interval: float,
    cost: CheckpointCost,
    mtbf: float,
    nodes: int,
    seed: int,
    spares: int | None = None,
    repair: float = REPAIR_SECONDS,
) -> Simulation:
    """`horizon` seconds of a run that takes a checkpoint after every `interval` seconds of training.

    `mtbf` is of the whole run: each of the `nodes` fails every mtbf * nodes seconds on average. `spares` None: there is
    always a spare node; repaired nodes become spares. Equal seeds give equal runs.
    """
    machines = _Nodes(nodes, mtbf * nodes, spares, repair, seed)
    result = Simulation(horizon, nodes, path=[(0.0, 0.0)])
    start = committed = 0.0
    while start < horizon:
        failure = machines.next_failure(start)
        until = min(failure, horizon)
        # Between two failures nothing is random: whole cycles of training and copy, and a part of one.
        elapsed, cycle = until - start, interval + cost.stall
        cycles = int(elapsed // cycle)
        rest = elapsed - cycles * cycle
        trained = min(rest, interval)
        result.checkpoints += cycles
        result.stalled += cycles * cost.stall + rest - trained
        done = committed + cycles * interval + trained
        result.path.append((until, done))
        if failure >= horizon:
            result.progress = done
            return result
        if elapsed >= cost.lag:
            committed += int((elapsed - cost.lag) // cycle) * interval
        result.lost += done - committed
        result.failure_times.append(failure)
        result.path.append((failure, committed))
        start = _recover(machines, failure, cost.restart, result)
        result.path.append((start, committed))
    result.progress = committed
    return result


def _recover(machines: _Nodes, failure: float, restart: float, result: Simulation) -> float:
    """When training goes on, at the horizon at the latest; a failure during a restart begins it anew."""
    now = failure
    while now < result.horizon:
        ready = min(machines.replace(now), result.horizon)
        result.waiting += ready - now
        end, failure = min(ready + restart, result.horizon), machines.next_failure(ready)
        result.restarting += min(end, failure) - ready
        if failure >= end:
            return end
        result.failure_times.append(failure)
        now = failure
    return result.horizon
