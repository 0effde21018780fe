"""One training step of a small transformer on one thread, the work that loading stands beside in workload 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH = 512, 64, 256


class Step:
    """A decoder layer with embeddings and AdamW; takes int64 `[batch, tokens]`, cut into rows of 256 tokens."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._embedding, self._head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self._layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self._mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        modules = nn.ModuleList([self._embedding, self._layer, self._head])
        self._optimizer = torch.optim.AdamW(modules.parameters())

    def __call__(self, tokens: Tensor) -> float:
        """One step; returns the loss."""
        usable = tokens.shape[1] // LENGTH * LENGTH
        rows = (tokens[:, :usable] % VOCABULARY).reshape(-1, LENGTH)
        hidden = self._layer(self._embedding(rows), src_mask=self._mask, is_causal=True)
        logits = self._head(hidden[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())
