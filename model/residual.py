"""Residual connections with norm and dropout around sub-layers, post- and pre-norm."""

from __future__ import annotations

from torch import Tensor, nn

from configs.schema import ModelSection
from model.dropout import SeededDropout


def make_norm(model: ModelSection) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over d_model."""
    kind = nn.LayerNorm if model.norm == "layer" else nn.RMSNorm
    return kind(model.d_model, eps=model.norm_eps)


class SubLayer(nn.Module):
    """post: Norm(x + Dropout(Sublayer(x))), sections 3.1 and 5.4 of the paper; pre: x + Dropout(Sublayer(Norm(x)))."""

    def __init__(self, model: ModelSection, seed: int, name: str) -> None:
        super().__init__()
        self.pre = model.norm_placement == "pre"
        self.dropout = SeededDropout(model.dropout, seed, name)
        self.norm = make_norm(model)

    def enter(self, x: Tensor) -> Tensor:
        """What the sub-layer is given."""
        return self.norm(x) if self.pre else x

    def leave(self, residual: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """The sum; all `[batch, sequence, d_model]`, `x` is the sub-layer's output."""
        added = self.dropout.added(residual, x, key)
        return added if self.pre else self.norm(added)
