"""Checkpoints against failures: size, cost, best interval, expected goodput.

Telar's ranks copy their share of the optimizer states to host memory while training stands still, and write it out
while training goes on (model/checkpoint.py), which is taken to cost training nothing: `stall` is the copy, `lag` the
writing, during which a failure falls back on the checkpoint before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.plan.devices import Device
from jobs.plan.layout import Layout
from jobs.plan.parameters import Shape, hidden_matrix_elements, parameters_by_part

# Grattafiori et al. 2024, section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
GPU_SECONDS_BETWEEN_FAILURES = 54 * 86400 * 16384 / 419
# Detecting a failure, a new process group, imports and engines, before states are read (elastic.start_timeout_seconds
# is the limit).
RESTART_SECONDS = 120.0
# Ranks meet before they copy, and training picks up speed after it: assumed, not measured.
MEETING_SECONDS = 1.0


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes of a checkpoint, and seconds: training's `stall`, the `lag` until it is committed, a `restart` from it."""

    bytes: float
    stall: float
    lag: float
    restart: float


def checkpoint_cost(config: RunConfig, shape: Shape, layout: Layout, device: Device) -> CheckpointCost:
    """Master weights and moments in fp32, spread evenly over all ranks; every node writes its ranks' share."""
    parameters = sum(parameters_by_part(shape).values())
    size = 12.0 * parameters
    if config.optimizer.name == "muon":
        size -= 4.0 * hidden_matrix_elements(shape)
    per_node = size / layout.nodes
    stall = MEETING_SECONDS + size / layout.ranks / (device.host_gb_per_second * 1e9)
    lag = per_node / (device.storage_gb_per_second * 1e9)
    return CheckpointCost(size, stall, lag, RESTART_SECONDS + lag)


def time_between_failures(layout: Layout) -> float:
    """Seconds between failures of any of the ranks' devices, at the rate of the Llama 3 405B run."""
    return GPU_SECONDS_BETWEEN_FAILURES / layout.ranks


def best_interval(cost: CheckpointCost, mtbf: float) -> float:
    """Seconds of training between checkpoints: sqrt(2 stall mtbf) (Young 1974), not shorter than writing one takes.

    Daly 2006, equation 20 adds higher orders, which matter when the stall is not small against `mtbf`.
    """
    stall = cost.stall
    if stall >= 2 * mtbf:
        return max(cost.lag, mtbf)
    ratio = stall / (2 * mtbf)
    daly = math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall
    return max(cost.lag, daly)


def expected_goodput(interval: float, cost: CheckpointCost, mtbf: float) -> float:
    """Share of wall time that becomes committed progress, failures coming at random (Daly 2006, equation 13).

    A segment of `interval` and its stall takes mtbf e^(restart / mtbf) (e^((interval + stall) / mtbf) - 1) on average.
    A failure within `lag` of a copy loses one interval more: `lag` seconds more per failure on average, which are
    added to the restart.
    """
    exponent = (interval + cost.stall) / mtbf
    if exponent > 500:
        return 0.0
    spent = mtbf * math.exp((cost.restart + cost.lag) / mtbf) * math.expm1(exponent)
    return interval / spent
