"""Training on weights that are rounded as `telar compress` will round them: quantization-aware training.

Forward passes see the packed values of each matrix, gradients pass the rounding as if it were not there (Bengio et al.
2013, "Estimating or propagating gradients", the straight-through estimator; Jacob et al. 2018, section 3). Parameters
and the optimizer stay as they are, so checkpoints hold the weights before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import TrainSection
from model.packed import DynamicInt8Weight, Int4Weight, Int8Weight, pack

# Values of `train.quantize` by the kind of packing that it prepares for.
ROUNDED_AS = {Int8Weight.kind: "int8", DynamicInt8Weight.kind: "int8", Int4Weight.kind: "int4"}
KIND_OF = {"int8": Int8Weight.kind, "int4": Int4Weight.kind}


@dataclass(frozen=True)
class Rounding:
    """To which packed form; `group` is for int4."""

    kind: str
    group: int = 64

    def __call__(self, weight: Tensor) -> Tensor:
        """`[out, in]` as it is after packing, in its own dtype; its gradient is that of the result."""
        return _StraightThrough.apply(weight, self)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, rounding: Rounding) -> Tensor:  # noqa: ANN001
        return pack(weight, rounding.kind, rounding.group).dense().to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # noqa: ANN001
        return gradient, None


def round_weights(module: nn.Module, section: TrainSection) -> None:
    """Have every layer under `module` that packing changes use rounded weights, if `train.quantize` says so."""
    if section.quantize is None:
        return
    for layer in module.modules():
        # Layers that `model.quantize` packs declare it.
        if hasattr(layer, "rounding"):
            layer.rounding = Rounding(KIND_OF[section.quantize])


def as_trained(weight: Tensor, rounding: Rounding | None) -> Tensor:
    """What a layer computes with: the weight, or the rounded one."""
    return weight if rounding is None else rounding(weight)
