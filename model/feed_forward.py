"""The position-wise feed-forward layer: equation 2 of Vaswani et al. 2017, with GELU, or gated (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """relu: max(0, x W1 + b1) W2 + b2; gelu: gelu in place of max; swiglu: (silu(x Wg + bg) * (x W1 + b1)) W2 + b2."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        assert activation in ("relu", "gelu", "swiglu")
        self.activation = activation
        self.inner = nn.Linear(d_model, d_ff, bias)
        if activation == "swiglu":
            self.gate = nn.Linear(d_model, d_ff, bias)
        self.outer = nn.Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, d_model]` -> the same shape."""
        if self.activation == "swiglu":
            return self.outer(F.silu(self.gate(x)) * self.inner(x))
        activate = F.relu if self.activation == "relu" else F.gelu
        return self.outer(activate(self.inner(x)))
