"""Predicted time of one optimizer step and what follows: tokens/s, utilisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.plan.devices import Device
from jobs.plan.flops import training_flops
from jobs.plan.kernels import head_time, layer_time, optimizer_time
from jobs.plan.layout import Layout, micro_batches
from jobs.plan.memory import stage_layers
from jobs.plan.parameters import Shape
from jobs.plan.techniques import Techniques
from jobs.plan.traffic import Flow, stage_parameters, step_traffic

# Relative spread of equal ranks' step times (clocks under a power limit, jitter of hosts and networks). A step waits
# for the slowest rank: the largest of n normal deviates is about sqrt(2 ln n) of them away.
RANK_SPREAD = 0.02


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause, and what they mean."""

    matrices: float
    attention: float
    memory: float
    launch: float
    head: float
    optimizer: float
    bubble: float
    stragglers: float
    flows: tuple[Flow, ...]
    tokens: int
    ranks: int
    flops: float
    peak_flops: float

    @property
    def communication(self) -> float:
        """Seconds that the step waits for communication."""
        return sum(flow.seconds for flow in self.flows)

    @property
    def seconds(self) -> float:
        """The whole step."""
        work = self.matrices + self.attention + self.memory + self.launch + self.head + self.optimizer
        return work + self.communication + self.bubble + self.stragglers

    @property
    def bubble_share(self) -> float:
        """Share of the step in which pipeline stages wait for work."""
        return self.bubble / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks together, source and target."""
        return self.tokens / self.seconds

    @property
    def flops_per_rank(self) -> float:
        """Model FLOP/s of one rank."""
        return self.flops / self.seconds / self.ranks

    @property
    def utilisation(self) -> float:
        """MFU: model FLOPs against the device's peak (Chowdhery et al. 2022)."""
        return self.flops_per_rank / self.peak_flops


def step_time(config: RunConfig, shape: Shape, layout: Layout, device: Device, techniques: Techniques) -> StepTime:
    """The prediction; samples are taken to be full."""
    count = -(-micro_batches(config) // layout.data)
    share = stage_layers(shape, layout) / shape.layers
    layers = [
        (stack, layer_time(config, shape, stack, layout, device, techniques)) for stack in shape.stacks if stack.depth
    ]
    matrices, attention, memory, launch = (
        share * count * sum(stack.depth * getattr(time, kind) for stack, time in layers)
        for kind in ("matrices", "attention", "memory", "launch")
    )
    # The head runs on the last stage, which all others wait for.
    head = count * head_time(config, shape, layout, device)
    held = stage_parameters(shape, layout)
    flows = tuple(step_traffic(config, shape, layout, device, techniques, held))
    within = sum(flow.seconds for flow in flows if flow.name in ("tensor", "pipeline"))
    # (p - 1) / (v m) of the work of a stage (Narayanan et al. 2021, section 2.2).
    busy = matrices + attention + memory + launch + head + within
    bubble = busy * (layout.pipeline - 1) / (techniques.interleave * count)
    optimizer = optimizer_time(held, layout.data, device)
    work = busy + bubble + optimizer + sum(flow.seconds for flow in flows if flow.name not in ("tensor", "pipeline"))
    stragglers = work * RANK_SPREAD * math.sqrt(2 * math.log(layout.ranks)) if layout.ranks > 1 else 0.0
    flops = training_flops(shape).sample * config.train.global_batch_sequences
    return StepTime(
        matrices,
        attention,
        memory,
        launch,
        head,
        optimizer,
        bubble,
        stragglers,
        flows,
        shape.tokens * config.train.global_batch_sequences,
        layout.ranks,
        float(flops),
        device.peak_flops(config.train.precision),
    )
