"""Decoding step by step with a key/value cache: a source is encoded once, each new token costs one position.

Works on the decoder of an encoder-decoder and on a decoder alone, with every kind of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import segment_mask
from model.embedding import Bridge
from model.layers import DecoderLayer, FinalNorm, SelfAttentionLayer
from model.transformer import Transformer

# Prompts that are read together differ by so much in length at most, but for those of few tokens.
LIKE, SHORT = 0.8, 16

KeysValues = tuple[Tensor, Tensor]


@dataclass
class DecoderCache:
    """What a decoder layer remembers: keys and values `[rows, heads, positions, d_model / heads]`.

    `memory` is None for a decoder without encoder.
    """

    own: KeysValues
    memory: KeysValues | None

    def select(self, rows: Tensor) -> None:
        """Keep only some rows, in the order given (int64 `[rows]`; a row may stand there more than once)."""
        self.own = (self.own[0][rows], self.own[1][rows])
        if self.memory is not None:
            self.memory = (self.memory[0][rows], self.memory[1][rows])


class Decoding:
    """A batch of outputs in the making, one per row; use it under `torch.no_grad()` in evaluation mode."""

    def __init__(self, model: Transformer, sources: Sequence[Sequence[int]]) -> None:
        """`sources`: token ids of each row, any lengths (an empty one is allowed: nothing to attend to).

        A decoder without encoder takes nothing from them but their number: feed it what is to be continued.
        """
        self._model = model
        self._key = torch.zeros(2, dtype=torch.int64)
        device = model.embedding.weight.device
        layers = model.layers()
        bridge = next((i for i, layer in enumerate(layers) if isinstance(layer, Bridge)), None)
        first = 1 if bridge is None else bridge + 1
        self._embedding = layers[first - 1]
        self._layers = [layer for layer in layers[first:-1] if not isinstance(layer, FinalNorm)]
        self._end = [layer for layer in layers[first:-1] if isinstance(layer, FinalNorm)]
        # Int `[rows, positions]` of what was fed: position in its text, and whether there is a token.
        self._positions = torch.zeros(len(sources), 0, dtype=torch.int64, device=device)
        self._real = torch.zeros(len(sources), 0, dtype=torch.bool, device=device)
        self._segments: Tensor | None = None
        memories: list[KeysValues | None] = [None] * len(self._layers)
        if bridge is not None:
            memory = self._encode(sources, layers[:bridge])
            memories = [layer.cross_attention.keys_values(memory) for layer in self._layers]
        self._caches = []
        for layer, memory_keys_values in zip(self._layers, memories, strict=True):
            empty = torch.zeros(
                len(sources), 0, model.section.d_model, dtype=model.embedding.weight.dtype, device=device
            )
            own = layer.attention.keys_values(empty, self._positions)
            self._caches.append(DecoderCache(own, memory_keys_values))
        self.length = 0

    def _encode(self, sources: Sequence[Sequence[int]], layers: Sequence[torch.nn.Module]) -> Tensor:
        width = max(1, *(len(source) for source in sources))
        tokens, real = padded(sources, width, left=False)
        device = self._real.device
        tokens, self._segments = tokens.to(device), real.long().to(device)
        positions = torch.arange(width, device=device).expand_as(tokens)
        nothing = tokens[:, :0]
        state = (tokens, positions, self._segments, nothing, nothing, nothing, self._key)
        for layer in layers:
            state = layer(state)
        return state[0]

    def select(self, rows: Tensor) -> None:
        """Keep only some rows, in the order given (int64 `[rows]`; a row may stand there more than once)."""
        self._positions, self._real = self._positions[rows], self._real[rows]
        if self._segments is not None:
            self._segments = self._segments[rows]
        for cache in self._caches:
            cache.select(rows)

    def advance(self, tokens: Tensor) -> Tensor:
        """Feed the next token of each row (int64 `[rows]`); float32 logits `[rows, vocabulary]` of the one after."""
        return self.feed(tokens.unsqueeze(1), torch.ones_like(tokens, dtype=torch.bool).unsqueeze(1))

    def feed(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Feed several tokens of each row, int64 `[rows, n]`; float32 logits `[rows, vocabulary]` of the one after.

        `real` bool `[rows, n]` is False on padding, which must stand before a row's tokens.
        """
        return self._model.head.logits(self.read(tokens, real)[:, -1])

    def read(self, tokens: Tensor, real: Tensor) -> Tensor:
        """As `feed`, but the states `[rows, n, d_model]` that `model.head.logits` makes the logits of each place of."""
        before = self._real.sum(1, keepdim=True)
        positions = (before + real.long().cumsum(1) - 1).clamp(min=0)
        self._positions = torch.cat((self._positions, positions), 1)
        self._real = torch.cat((self._real, real), 1)
        hidden = self._embedding.embed(tokens, positions, self._key)
        across = None if self._segments is None else segment_mask(torch.ones_like(tokens), self._segments)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            hidden = self._run(layer, cache, hidden, positions, across)
        for end in self._end:
            hidden = end.norm(hidden)
        self.length += tokens.shape[1]
        return hidden

    def _run(
        self,
        layer: DecoderLayer | SelfAttentionLayer,
        cache: DecoderCache,
        hidden: Tensor,
        positions: Tensor,
        across: Tensor | None,
    ) -> Tensor:
        attention = layer.attention
        entered = layer.attention_output.enter(hidden)
        new = attention.keys_values(entered, positions)
        cache.own = tuple(torch.cat((old, extra), dim=2) for old, extra in zip(cache.own, new, strict=True))
        allowed = attention.kind.mask_mod(positions.unsqueeze(-1), self._positions.unsqueeze(-2))
        mask = (allowed & self._real.unsqueeze(-2)).unsqueeze(1)
        attended = attention.mix(attention.queries(entered, positions), *cache.own, mask)
        if cache.memory is None:
            return layer.finish(hidden, attended, self._key)
        return layer.finish(hidden, attended, cache.memory, across, self._key)


def padded(rows: Sequence[Sequence[int]], width: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of tokens as int64 `[rows, width]`, zeros before (`left`) or behind, and a bool for real tokens."""
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[number, place] = torch.tensor(row, dtype=torch.int64)
        real[number, place] = True
    return tokens, real


def start(model: Transformer, sources: Sequence[Sequence[int]], bos_id: int) -> tuple[Decoding, Tensor]:
    """A decoding that has read `bos_id`, and behind it, without an encoder, the source; logits of the first output."""
    alone = model.section.architecture == "decoder"
    prompts = [[bos_id, *source] if alone else [bos_id] for source in sources]
    device = model.embedding.weight.device
    parts, logits, groups = [], [], of_like_length(list(map(len, prompts)))
    for group in groups:
        tokens, real = padded([prompts[row] for row in group], max(len(prompts[row]) for row in group), left=True)
        parts.append(Decoding(model, [sources[row] for row in group]))
        logits.append(parts[-1].feed(tokens.to(device), real.to(device)))
    if len(parts) == 1:
        return parts[0], logits[0]
    decoding, order = joined(parts), torch.tensor([row for group in groups for row in group], device=device).argsort()
    decoding.select(order)
    return decoding, torch.cat(logits)[order]


def of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups, longest first, whose lengths differ by a fifth at most; short ones are one group.

    Rows that are read together cost as much as the longest of them.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        # The first of a group is its longest until all are known.
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (longest <= SHORT or lengths[row] >= LIKE * longest):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


def joined(parts: Sequence[Decoding]) -> Decoding:
    """Decodings of one model without encoder as one, rows in order; the first part becomes it."""
    width, whole = max(part.length for part in parts), parts[0]
    for part in parts:
        missing = width - part.length
        part._positions, part._real = (F.pad(each, (missing, 0)) for each in (part._positions, part._real))
        for cache in part._caches:
            cache.own = tuple(F.pad(each, (0, 0, missing, 0)) for each in cache.own)
    whole._positions = torch.cat([part._positions for part in parts])
    whole._real = torch.cat([part._real for part in parts])
    for number, cache in enumerate(whole._caches):
        both = zip(*(part._caches[number].own for part in parts), strict=True)
        cache.own = tuple(torch.cat(each) for each in both)
    whole.length = width
    return whole
