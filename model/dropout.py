"""Dropout that depends on what is dropped and when, not on the process it happens in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.mesh import ALONE, Axis
from model.seeds import generator


class SeededDropout(nn.Module):
    """Dropout whose mask is a function of (run seed, step, micro-batch, layer), not of the process it runs in.

    What all tensor ranks hold alike gets the same mask on all of them. What they share by heads (`heads`, dimension 1)
    gets that rank's part of the mask for all heads, which every rank draws whole: with any number of ranks the masks
    are those of one.
    """

    def __init__(self, probability: float, seed: int, name: str, heads: Axis = ALONE) -> None:
        super().__init__()
        self.probability, self.seed, self.name, self.heads = probability, seed, name, heads

    @property
    def active(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.probability > 0

    def mask(self, like: Tensor, key: Tensor) -> Tensor:
        """Zeros with probability p, else 1 / (1 - p), in the shape and dtype of `like`; `key` int64 `[2]`."""
        keep = 1.0 - self.probability
        random = generator(self.seed, *key.tolist(), self.name, device=like.device)
        if self.heads.size == 1:
            return torch.empty_like(like).bernoulli_(keep, generator=random).div_(keep)
        here, shape = like.shape[1], list(like.shape)
        shape[1] = here * self.heads.size
        drawn = like.new_empty(shape).bernoulli_(keep, generator=random)
        return drawn.narrow(1, here * self.heads.rank, here).div(keep)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        """`x` with elements dropped while training."""
        return x * self.mask(x, key) if self.active else x

    def added(self, residual: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """`residual + dropout(x)` in one pass over the elements."""
        return torch.addcmul(residual, x, self.mask(x, key)) if self.active else residual + x
