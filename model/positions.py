"""Sinusoidal positions of Vaswani et al. 2017, section 3.5, from position ids."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def sinusoidal_positions(positions: Tensor, d_model: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[..., d_model]` for int positions `[...]`: PE(pos, 2i) = sin(pos / 10000^(2i/d_model)), PE(pos, 2i+1) = cos.

    Computed from ids and not from the place in the row, because packed documents each start at position 0; in
    float64, so that far positions are as exact as near ones.
    """
    exponents = torch.arange(0, d_model, 2, dtype=torch.float64, device=positions.device) / d_model
    angles = positions.to(torch.float64).unsqueeze(-1) * BASE**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)
