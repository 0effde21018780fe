"""Linear layers and embeddings shared by tensor ranks (Shoeybi et al. 2019, "Megatron-LM", section 3).

On one rank each is the plain computation, to the bit. Two conjugate functions move data between ranks: `copied` is
the identity and sums gradients (f in the paper), `reduced` sums and passes gradients on (g in the paper).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.mesh import ALONE, Axis
from model.packed import PackedWeight, look_up
from model.rounding import Rounding, as_trained
from model.sliced import Slice, mark


def copied(x: Tensor, axis: Axis) -> Tensor:
    """`x`, equal on all ranks of the axis, where computation on slices begins; its gradient is summed over ranks.

    Called once for all column-parallel layers that read `x`.
    """
    return x if axis.size == 1 else _Copied.apply(x, axis)


def reduced(x: Tensor, axis: Axis) -> Tensor:
    """The sum of `x` over the ranks of the axis, on all of them; the gradient, equal on all, passes."""
    return x if axis.size == 1 else _Reduced.apply(x, axis)


def gathered(x: Tensor, whole: Slice | None, axis: Axis) -> Tensor:
    """Slices of the last dimension, which `whole` describes, put together on all ranks; gradients are cut likewise."""
    return x if whole is None else _Gathered.apply(x, whole, axis)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:  # noqa: ANN001
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # noqa: ANN001
        return _sum(gradient, ctx.axis), None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:  # noqa: ANN001
        return _sum(x, axis)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # noqa: ANN001
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, whole: Slice, axis: Axis) -> Tensor:  # noqa: ANN001
        ctx.whole = whole
        # Slices may differ in size; each element is of one rank and 0 on all others, so the sum is exact.
        result = x.new_zeros(*x.shape[:-1], whole.full)
        result[..., whole.start : whole.stop] = x
        dist.all_reduce(result, group=axis.group)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):  # noqa: ANN001
        return gradient[..., ctx.whole.start : ctx.whole.stop], None, None


def _sum(x: Tensor, axis: Axis) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=axis.group)
    return result


class ColumnParallelLinear(nn.Linear):
    """`x W^T + b` with the outputs divided among ranks: each has rows of the weight, and of the bias.

    `x` must have passed `copied`. Outputs divide evenly. `rounding` is for quantization-aware training.
    """

    rounding: Rounding | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = True, axis: Axis = ALONE) -> None:
        assert outputs % axis.size == 0
        super().__init__(inputs, outputs // axis.size, bias)
        for parameter in self.parameters():
            mark(parameter, Slice(0, outputs, axis.rank, axis.size))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` -> `[..., outputs of this rank]`."""
        return F.linear(x, as_trained(self.weight, self.rounding), self.bias)


class RowParallelLinear(nn.Linear):
    """`x W^T + b` with the inputs divided among ranks: each has columns of the weight, and all of the bias.

    The products are summed over ranks, then the bias is added, once. Inputs divide evenly. `rounding` as above.
    """

    rounding: Rounding | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = True, axis: Axis = ALONE) -> None:
        assert inputs % axis.size == 0
        super().__init__(inputs // axis.size, outputs, bias)
        self.axis = axis
        mark(self.weight, Slice(1, inputs, axis.rank, axis.size))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs of this rank]` -> `[..., outputs]`, equal on all ranks."""
        if self.axis.size == 1:
            return F.linear(x, as_trained(self.weight, self.rounding), self.bias)
        product = reduced(F.linear(x, self.weight), self.axis)
        return product if self.bias is None else product + self.bias


def vocabulary_matrix(vocabulary_size: int, d_model: int, axis: Axis = ALONE) -> nn.Parameter:
    """This rank's rows of a matrix `[vocabulary, d_model]`, not set; rows need not divide evenly."""
    rows = Slice(0, vocabulary_size, axis.rank, axis.size)
    assert rows.stop > rows.start, f"{axis.size} ranks for {vocabulary_size} rows"
    return mark(nn.Parameter(torch.empty(rows.stop - rows.start, d_model)), rows)


def embedded(tokens: Tensor, weight: Tensor | PackedWeight, rows: Slice | None, axis: Axis = ALONE) -> Tensor:
    """Rows of the whole matrix for int `tokens [...]`; `weight` holds the `rows` of this rank. `[..., d_model]`.

    A packed matrix is whole.
    """
    if rows is None:
        return look_up(tokens, weight)
    elsewhere = (tokens < rows.start) | (tokens >= rows.stop)
    found = F.embedding((tokens - rows.start).masked_fill(elsewhere, 0), weight)
    return reduced(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), axis)
