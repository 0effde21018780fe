"""Time of one rank's arithmetic: matrix multiplications, attention, passes over memory.

A matrix multiplication of inner dimension k takes flops / (peak x attainable) x (1 + ramp / k): each tile starts and
ends with work that does not grow with k. A training pass has three of them per weight, with the inputs, the outputs
and the tokens as inner dimension, so narrow models, finely split ones and small micro-batches are slower.

The constants here, in `traffic.py`, `step.py` and two per device are chosen once for all published runs together.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.plan.devices import Device
from jobs.plan.flops import keys_seen
from jobs.plan.layout import Layout
from jobs.plan.memory import activation_width
from jobs.plan.parameters import Matrix, Shape, Stack
from jobs.plan.techniques import Techniques

# Attention kernels against large matrix multiplications: their products are narrow (one head) and wait for softmax.
ATTENTION_SHARE = {"flash": 0.4, "masked": 0.25, "unfused": 0.6}
# Share of memory bandwidth that kernels reach which stream from and to it.
STREAMING = 0.85
# Passes over all scores (heads x tokens x keys) where they are written out: product, scale and mask, softmax and
# dropout, forward and backward.
UNFUSED_PASSES = 13
# Passes over d_model elements per norm (with its residual sum and cast), and over d_ff elements per activation, forward
# and backward: each reads or writes every element once. Eager runs bias, cast, norm, sum and their gradients apart.
NORM_PASSES = {"fused": 9, "eager": 36}
FEATURE_PASSES = {"fused": 6, "eager": 12}
# Kernels of one layer, forward and backward, each of which the host takes device.launch_microseconds to start: a layer
# cannot be quicker than that. Counted roughly, not measured.
KERNELS = {"fused": 50, "eager": 100}


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer's forward and backward for one micro-batch on one tensor rank.

    `launch` is what a layer of small tensors waits for the host to start its kernels.
    """

    matrices: float
    attention: float
    memory: float
    launch: float


def layer_time(
    config: RunConfig, shape: Shape, stack: Stack, layout: Layout, device: Device, techniques: Techniques
) -> LayerTime:
    """One layer of the stack, recomputation of its forward pass included where `techniques` has it."""
    model, rows, tensor = shape.model, config.train.micro_batch_sequences, layout.tensor
    speed = device.peak_flops(config.train.precision) * device.attainable
    again = 4 / 3 if techniques.recompute == "full" else 1.0
    matrices = 0.0
    for matrix in stack.matrices:
        tokens = rows * (shape.source_tokens if matrix.over_source else shape.target_tokens)
        matrices += matrix_time(matrix, tokens, tensor, speed, device.ramp)
    keys = keys_seen(model, stack) + stack.memory_tokens
    computed = keys / 2 if techniques.attention == "flash" and stack.causal and not stack.memory_tokens else keys
    scores = 12 * model.d_model * rows * stack.tokens * computed / tensor
    attention = scores / (speed * ATTENTION_SHARE[techniques.attention])
    width = activation_width(config)
    shared = tensor if techniques.sequence_parallel else 1
    gates = 1.5 if model.feed_forward == "swiglu" else 1.0
    moved = stack.norms * NORM_PASSES[techniques.elementwise] * model.d_model / shared
    moved += FEATURE_PASSES[techniques.elementwise] * gates * model.d_ff / tensor
    if techniques.attention == "unfused":
        moved += UNFUSED_PASSES * model.heads * keys / tensor
    memory = moved * width * rows * stack.tokens / (device.memory_gb_per_second * 1e9 * STREAMING)
    work = (matrices + attention + memory) * again
    launch = max(0.0, KERNELS[techniques.elementwise] * device.launch_microseconds * 1e-6 - work)
    return LayerTime(matrices * again, attention * again, memory * again, launch)


def matrix_time(matrix: Matrix, tokens: int, tensor: int, speed: float, ramp: float) -> float:
    """Seconds of forward and backward of a matrix over `tokens` on one of `tensor` ranks, at `speed` FLOP/s."""
    inputs = matrix.inputs / (tensor if matrix.cut == "row" else 1)
    outputs = matrix.outputs / (tensor if matrix.cut == "column" else 1)
    return product_time(inputs, outputs, tokens, speed, ramp)


def product_time(inputs: float, outputs: float, tokens: float, speed: float, ramp: float) -> float:
    """Seconds of the three multiplications of a weight `[outputs, inputs]` over `tokens`."""
    each = 2 * inputs * outputs * tokens / speed
    return each * (3 + ramp / inputs + ramp / outputs + ramp / tokens)


def head_time(config: RunConfig, shape: Shape, layout: Layout, device: Device) -> float:
    """Seconds of forward and backward of the output projection and the loss for one micro-batch on one tensor rank."""
    speed = device.peak_flops(config.train.precision) * device.attainable
    tokens = config.train.micro_batch_sequences * shape.scored_tokens
    outputs = shape.head_outputs / layout.tensor
    # The softmax passes over fp32 scores about six times: product, maximum, exponential, sum, gradient, cast.
    passes = 6 * 4 * outputs * tokens / (device.memory_gb_per_second * 1e9 * STREAMING)
    return product_time(shape.model.d_model, outputs, tokens, speed, device.ramp) + passes


def optimizer_time(parameters: float, replicas: int, device: Device) -> float:
    """Seconds of Adam on this rank's share: reads and writes master, moments and gradient (32 bytes per parameter)."""
    return 32 * parameters / replicas / (device.memory_gb_per_second * 1e9 * STREAMING)
