"""Batched greedy decoding with a key/value cache: the source is encoded once, each new token costs one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import segment_mask
from model.layers import Bridge, DecoderLayer
from model.transformer import Transformer

KeysValues = tuple[Tensor, Tensor]


@dataclass
class DecoderCache:
    """What a decoder layer remembers: keys and values `[batch, heads, positions, d_model / heads]`."""

    memory: KeysValues
    own: KeysValues

    def select(self, rows: Tensor) -> None:
        """Keep only some rows, in the order given (int64 `[rows]`)."""
        self.memory = (self.memory[0][rows], self.memory[1][rows])
        self.own = (self.own[0][rows], self.own[1][rows])


class Decoding:
    """A batch of outputs in the making, one source per row."""

    def __init__(self, model: Transformer, sources: Sequence[Sequence[int]]) -> None:
        """`sources`: token ids of each row, any lengths (an empty one is allowed: nothing to attend to)."""
        self._model = model
        self._layers = model.layers(DecoderLayer)
        self._key = torch.zeros(2, dtype=torch.int64)
        device = model.embedding.weight.device
        width = max(1, *(len(source) for source in sources))
        tokens = torch.zeros(len(sources), width, dtype=torch.int64)
        self._segments = torch.zeros(len(sources), width, dtype=torch.int64)
        for row, source in enumerate(sources):
            tokens[row, : len(source)] = torch.tensor(source, dtype=torch.int64)
            self._segments[row, : len(source)] = 1
        tokens, self._segments = tokens.to(device), self._segments.to(device)
        positions = torch.arange(width, device=device).expand_as(tokens)
        nothing = tokens[:, :0]
        state = (tokens, positions, self._segments, nothing, nothing, nothing, self._key)
        for layer in model.layers():
            if isinstance(layer, Bridge):
                break
            state = layer(state)
        memory = state[0]
        empty = self._layers[0].attention.split(memory[:, :0])
        self._caches = [
            DecoderCache(layer.cross_attention.keys_values(memory), (empty, empty)) for layer in self._layers
        ]
        self.length = 0

    def select(self, rows: Tensor) -> None:
        """Keep only some rows, in the order given (int64 `[rows]`)."""
        self._segments = self._segments[rows]
        for cache in self._caches:
            cache.select(rows)

    def advance(self, tokens: Tensor) -> Tensor:
        """Feed the next token of each row (int64 `[rows]`); float32 logits `[rows, vocabulary]` of the one after."""
        column = tokens.unsqueeze(1)
        hidden = self._model.bridge.embed(column, torch.full_like(column, self.length), self._key)
        across = segment_mask(torch.ones_like(column), self._segments)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            new = layer.attention.keys_values(hidden)
            cache.own = tuple(torch.cat((old, extra), dim=2) for old, extra in zip(cache.own, new, strict=True))
            hidden = layer.run(hidden, cache.own, None, cache.memory, across, self._key)
        self.length += 1
        return self._model.head.logits(hidden[:, 0])


@torch.no_grad()
def greedy(
    model: Transformer, sources: Sequence[Sequence[int]], bos_id: int, eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """The most probable token at each place, per row until `eos_id` (which is kept) or `max_new_tokens`.

    Rows that have ended leave the batch. The model is put into evaluation mode for the call.
    """
    if not sources:
        return []
    training = model.training
    model.eval()
    try:
        decoding = Decoding(model, sources)
        device = model.embedding.weight.device
        outputs: list[list[int]] = [[] for _ in sources]
        rows = list(range(len(sources)))
        tokens = torch.full((len(sources),), bos_id, dtype=torch.int64, device=device)
        while rows and decoding.length < max_new_tokens:
            tokens = decoding.advance(tokens).argmax(-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                outputs[row].append(token)
            going_on = (tokens != eos_id).nonzero().squeeze(-1)
            if len(going_on) < len(rows):
                rows = [rows[i] for i in going_on.tolist()]
                tokens = tokens[going_on]
                decoding.select(going_on)
        return outputs
    finally:
        model.train(training)
