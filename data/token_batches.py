"""Batches of bare tokens of layout sequence, for plain use and measuring: no thread, loss weights or replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from configs.errors import ConfigError
from configs.schema import RunConfig
from data.batches import join
from data.manifest import Manifest
from data.open_shards import OpenShard
from data.reader import SampleReader
from data.ring import token_tensors

if TYPE_CHECKING:
    from data.ring import Tensor

BATCHES_HELD = 2


class TokenBatches:
    """int64 tensors `[batch, S]` of consecutive samples of the order from sample `start` on, without end.

    S is `data.target_tokens`; length buckets are ignored. A row holds the sample's pairs one behind the other, each
    source before its target, and then padding. Tensors are reused: one is valid until the next but one is asked for.
    Raises ConfigError when the layout is not sequence, and what `open_shard` raises.
    """

    def __init__(
        self, manifest: Manifest, config: RunConfig, open_shard: OpenShard, batch: int, start: int = 0
    ) -> None:
        if config.data.layout != "sequence":
            raise ConfigError(f"data.layout: {config.data.layout!r} has no rows of bare tokens; set it to sequence")
        self._reader = SampleReader(manifest, config, open_shard)
        self._pad_id = manifest.pad_id
        self._batch, self._position = batch, start
        self._plan = self._reader.consecutive(start, batch)
        self._buffers = token_tensors(BATCHES_HELD, batch, manifest.target_capacity)
        self._turn = 0

    @property
    def position(self) -> int:
        """Samples handed out, those before `start` included: `start` of a reader that is to go on from here."""
        return self._position

    def __iter__(self) -> TokenBatches:
        return self

    def __next__(self) -> Tensor:
        shards, rows = next(self._plan)
        tensor, lines, flat = self._buffers[self._turn]
        self._turn = (self._turn + 1) % BATCHES_HELD
        full = self._reader.full_rows(shards, rows, lines[0].size)
        if full is not None:
            # One call for all rows, which it widens on the way: faster than a copy for each.
            np.concatenate(full, out=flat, casting="same_kind")
        else:
            for line, shard, row in zip(lines, shards, rows, strict=True):
                line[join(self._reader.row(shard, row), line) :] = self._pad_id
        self._position += self._batch
        return tensor
