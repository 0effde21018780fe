"""The position-wise feed-forward layer: equation 2 of Vaswani et al. 2017, with GELU, or gated (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.mesh import ALONE, Axis
from model.parallel_linear import ColumnParallelLinear, RowParallelLinear, copied


class FeedForward(nn.Module):
    """relu: max(0, x W1 + b1) W2 + b2; gelu: gelu in place of max; swiglu: (silu(x Wg + bg) * (x W1 + b1)) W2 + b2.

    Ranks of `tensor` share the d_ff hidden units.
    """

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True, tensor: Axis = ALONE
    ) -> None:
        super().__init__()
        assert activation in ("relu", "gelu", "swiglu")
        self.activation, self.tensor = activation, tensor
        self.inner = ColumnParallelLinear(d_model, d_ff, bias, tensor)
        if activation == "swiglu":
            self.gate = ColumnParallelLinear(d_model, d_ff, bias, tensor)
        self.outer = RowParallelLinear(d_ff, d_model, bias, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, d_model]` -> the same shape."""
        x = copied(x, self.tensor)
        if self.activation == "swiglu":
            return self.outer(F.silu(self.gate(x)) * self.inner(x))
        activate = F.relu if self.activation == "relu" else F.gelu
        return self.outer(activate(self.inner(x)))
