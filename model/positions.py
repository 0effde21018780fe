"""Positions from position ids: sinusoidal (Vaswani et al. 2017, section 3.5) and rotary (Su et al. 2021).

Computed from ids and not from the place in the row, because packed documents each start at position 0; in float64, so
that far positions are as exact as near ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """position / base^(2i / width) for i < width / 2, float64 `[..., width / 2]`."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.to(torch.float64).unsqueeze(-1) * base**-exponents


def sinusoidal_positions(positions: Tensor, d_model: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[..., d_model]` for int positions `[...]`: PE(pos, 2i) = sin(pos / 10000^(2i/d_model)), PE(pos, 2i+1) = cos."""
    angles = _angles(positions, d_model, BASE)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions: `x [batch, heads, sequence, width]` with each pair (x_i, x_{i + width/2}) turned by its angle.

    `positions` int `[batch, sequence]`. The halves are rotated against each other, as in Llama, so that weights pass
    to and from it without a permutation.
    """
    angles = _angles(positions, x.shape[-1], base).unsqueeze(1)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
