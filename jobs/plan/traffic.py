"""Communication of one optimizer step, by rank and link: which collectives, how many bytes, how long.

Bytes are those that one rank sends: a ring all-reduce of n bytes over r ranks sends 2 n (r - 1) / r, all-gather and
reduce-scatter half of that (Thakur et al. 2005). A collective goes as fast as its slowest link: inside a node over the
node's own links; between nodes each rank's share of the network, times the ranks of the group in a node, which send
through all their network cards together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.schema import RunConfig
from jobs.plan.devices import Device
from jobs.plan.layout import Layout, micro_batches
from jobs.plan.memory import activation_width, stage_layers
from jobs.plan.parameters import Shape, layer_parameters
from jobs.plan.techniques import Techniques

# Share of a link's rate that large collectives reach (NCCL's bus bandwidth against the line rate).
LINK_SHARE = 0.8
# Share of data-parallel communication that hides behind the backward pass where the software overlaps them: the rest
# is the first and the last of it, and what collectives take from multiplications (processors, memory bandwidth).
HIDDEN = 0.3


@dataclass(frozen=True)
class Flow:
    """One kind of communication of a step: bytes that a rank sends, and seconds that the step waits for it."""

    name: Literal["tensor", "pipeline", "gradients", "parameters"]
    link: Literal["node", "network"]
    bytes: float
    seconds: float


def step_traffic(
    config: RunConfig, shape: Shape, layout: Layout, device: Device, techniques: Techniques, held: float
) -> list[Flow]:
    """All communication of a step of the fullest rank; `held` are the parameters of its part of the model.

    Kinds without partner are left out.
    """
    flows = []
    count = -(-micro_batches(config) // layout.data)
    width = activation_width(config)
    rows = config.train.micro_batch_sequences
    if layout.tensor > 1:
        share = (layout.tensor - 1) / layout.tensor
        # Two all-reduces forward and two backward per attention and feed-forward pair (Shoeybi et al. 2019, figure 4).
        passes = 6 if techniques.recompute == "full" else 4
        sent = 0.0
        for stack in shape.stacks:
            pairs = 1.5 if stack.memory_tokens else 1.0
            sent += stack.depth * pairs * passes * 2 * share * rows * stack.tokens * shape.model.d_model * width
        sent *= stage_layers(shape, layout) / shape.layers * count
        flows.append(Flow("tensor", "node", sent, sent / (device.link_gb_per_second * 1e9 * LINK_SHARE)))
    if layout.pipeline > 1:
        # Activations forward and gradients backward, of hidden and memory where the stage is a decoder's.
        tokens = shape.tokens if len(shape.stacks) > 1 else shape.stacks[0].tokens
        sent = 2.0 * count * rows * tokens * shape.model.d_model * width * techniques.interleave
        if techniques.sequence_parallel:
            sent /= layout.tensor
        inside = layout.stages_in_node
        rate = device.link_gb_per_second if inside else device.network_gb_per_second
        flows.append(Flow("pipeline", "node" if inside else "network", sent, sent / (rate * 1e9 * LINK_SHARE)))
    if layout.data > 1:
        flows += _of_replicas(layout, device, techniques, held, width, count)
    return flows


def stage_parameters(shape: Shape, layout: Layout) -> float:
    """Parameters of one rank's part of the model: its layers and an end, over its tensor ranks, before ZeRO."""
    per_layer = sum(stack.depth * layer_parameters(shape, stack) for stack in shape.stacks) / shape.layers
    ends = shape.vocabulary * shape.model.d_model * (1 if shape.model.tie_embeddings or layout.pipeline > 1 else 2)
    return (stage_layers(shape, layout) * per_layer + ends) / layout.tensor


def _of_replicas(
    layout: Layout, device: Device, techniques: Techniques, held: float, width: int, count: int
) -> list[Flow]:
    """Gradients out and parameters in, between the ranks that hold the same part of the model."""
    share = (layout.data - 1) / layout.data
    inside = layout.replicas_in_node
    rate = device.link_gb_per_second
    if not inside:
        rate = min(rate, device.network_gb_per_second * layout.replicas_per_node)
    speed = rate * 1e9 * LINK_SHARE
    if layout.zero == 3:
        # All-gathers before forward and before backward of every micro-batch, and its gradients out.
        gathered, reduced = 2 * count * share * held * width, count * share * held * techniques.gradient_bytes
    else:
        gathered = share * held * width
        # ZeRO-1 keeps all sums and reduces once a step, in bf16 by all-reduce; ZeRO-2 keeps a shard and reduces every
        # micro-batch.
        times = count if layout.zero == 2 else 2 if width == 2 else 1
        reduced = share * held * techniques.gradient_bytes * times
    exposed = 1 - HIDDEN if techniques.overlap else 1.0
    link = "node" if inside else "network"
    return [
        Flow("gradients", link, reduced, reduced / speed * exposed),
        Flow("parameters", link, gathered, gathered / speed * exposed),
    ]
