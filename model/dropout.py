"""Dropout that depends on what is dropped and when, not on the process it happens in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.seeds import generator


class SeededDropout(nn.Module):
    """Dropout whose mask is a function of (run seed, step, micro-batch, layer), not of the process it runs in."""

    def __init__(self, probability: float, seed: int, name: str) -> None:
        super().__init__()
        self.probability, self.seed, self.name = probability, seed, name

    @property
    def active(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.probability > 0

    def mask(self, like: Tensor, key: Tensor) -> Tensor:
        """Zeros with probability p, else 1 / (1 - p), in the shape and dtype of `like`; `key` int64 `[2]`."""
        keep = 1.0 - self.probability
        random = generator(self.seed, *key.tolist(), self.name, device=like.device)
        return torch.empty_like(like).bernoulli_(keep, generator=random).div_(keep)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        """`x` with elements dropped while training."""
        return x * self.mask(x, key) if self.active else x

    def added(self, residual: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """`residual + dropout(x)` in one pass over the elements."""
        return torch.addcmul(residual, x, self.mask(x, key)) if self.active else residual + x
