"""Memory-mapped shards and the places of rows in them: a bounded number of maps and of parsed record batches."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import numpy as np

from data.manifest import ShardInfo
from data.quarantine import QuarantinedShard
from data.shards import Row, ShardReader

OPEN_TRIES = 3
LEAST_MAPS = 256
LEAST_BLOCKS = 1024
# A map holds no file open, but the kernel allows a process some 65,000 maps, of which others need some too.
MOST_MAPS = 16384

OpenShard = Callable[[ShardInfo], str]
_NO_TOKENS = np.empty(0, dtype=np.uint16)
_NO_LENGTHS = np.empty(0, dtype=np.int32)
_MASKED: Row = (_NO_TOKENS, _NO_LENGTHS, _NO_TOKENS, _NO_LENGTHS)


class Block:
    """Where the rows of one record batch lie. `starts` lists those of labels in `tokens`, when each row is one pair of
    `width` labels without a source; else `width` is 0.
    """

    __slots__ = ("_bounds", "_numbers", "starts", "tokens", "width")

    def __init__(self, reader: ShardReader, first: int, rows: int) -> None:
        self.tokens, self._numbers = reader.tokens, reader.numbers
        starts, ends = reader.spans(np.arange(first, first + rows))
        # Of each row: start and end of source, source lengths, labels and label lengths in turn.
        self._bounds = np.stack([starts, ends], axis=1).reshape(8, rows).T
        pairs, sources = ends[1] - starts[1], ends[0] - starts[0]
        # Lists of int are read three times as fast as arrays, one number at a time.
        labels = ends[2] - starts[2]
        alike = not sources.any() and (pairs == 1).all() and (labels == labels[0]).all()
        self.starts, self.width = (starts[2].tolist(), int(labels[0])) if alike else ([], 0)

    def row(self, at: int) -> Row:
        """The row at place `at` of the record batch."""
        a, b, c, d, e, f, g, h = self._bounds[at].tolist()
        return self.tokens[a:b], self._numbers[c:d], self.tokens[e:f], self._numbers[g:h]


class MaskedBlock:
    """Stands for a whole quarantined shard: rows without pairs."""

    width = 0

    def row(self, at: int) -> Row:
        """A row without pairs."""
        return _MASKED


class _Opened:
    """A mapped shard and those of its record batches that are parsed; without a reader, a quarantined one."""

    __slots__ = ("block_rows", "blocks", "reader", "rows")

    def __init__(self, reader: ShardReader | None, rows: int) -> None:
        self.reader, self.rows = reader, rows
        self.block_rows = reader.block_rows if reader is not None else 1 << 62
        self.blocks: dict[int, Block | MaskedBlock] = {} if reader is not None else {0: MaskedBlock()}


class OpenShards:
    """Shards by number, opened when first asked for and closed when others were used more recently.

    `info(number)` describes a shard; `open_shard` gives the path of a verified copy. At least `blocks_at_once` record
    batches stay parsed, so that an order that walks so many at a time parses each once.
    """

    def __init__(self, info: Callable[[int], ShardInfo], open_shard: OpenShard, blocks_at_once: int) -> None:
        self._info, self._open_shard = info, open_shard
        # Openers that keep a lease on what is mapped are told when it no longer is.
        self._release: Callable[[ShardInfo], None] | None = getattr(open_shard, "release", None)
        self._most_bytes: int | None = getattr(open_shard, "lease_bytes", None)
        self._bytes = 0
        self._most_maps = min(max(LEAST_MAPS, blocks_at_once), MOST_MAPS)
        self._most_blocks = max(LEAST_BLOCKS, 2 * blocks_at_once)
        self._opened: OrderedDict[int, _Opened] = OrderedDict()
        self._parsed: deque[tuple[_Opened, int]] = deque()
        self._masked: dict[int, _Opened] = {}

    @property
    def quarantined(self) -> list[str]:
        """Paths of the shards that were found quarantined, sorted."""
        # The copy is one step for the interpreter: another thread may be opening shards.
        return sorted(self._info(number).path for number in list(self._masked))

    def find(self, shard: int, row: int) -> tuple[Block | MaskedBlock, int]:
        """The record batch of a row of a shard, and the row's place in it.

        Raises what `open_shard` raises, but QuarantinedShard, which gives rows without pairs from then on.
        """
        opened = self._opened.get(shard) or self._masked.get(shard) or self._open(shard)
        number, at = divmod(row, opened.block_rows)
        block = opened.blocks.get(number)
        return (block if block is not None else self._parse(shard, opened, number)), at

    def full_rows(self, shards: Sequence[int], rows: Sequence[int], width: int) -> list[np.ndarray] | None:
        """The labels of rows that all are one pair of `width` labels without source, or None.

        None, too, when such a row shares its record batch with others. `find` is written out here, as the
        innermost loop of all.
        """
        found, get = [], self._opened.get
        for shard, row in zip(shards, rows, strict=True):
            opened = get(shard) or self._masked.get(shard) or self._open(shard)
            number = row // opened.block_rows
            block = opened.blocks.get(number) or self._parse(shard, opened, number)
            if block.width != width:
                return None
            start = block.starts[row - number * opened.block_rows]
            found.append(block.tokens[start : start + width])
        return found

    def lengths(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source tokens and label tokens of rows of a shard, int64 `[n]` each; raises QuarantinedShard too."""
        opened = self._opened.get(shard) or self._masked.get(shard) or self._open(shard)
        if opened.reader is None:
            path = self._info(shard).path
            raise QuarantinedShard(path, f"shard {path} is quarantined, the lengths of its samples are not known")
        return opened.reader.lengths(rows)

    def _parse(self, shard: int, opened: _Opened, number: int) -> Block:
        first = number * opened.block_rows
        rows = min(opened.block_rows, opened.rows - first)
        block = opened.blocks[number] = Block(opened.reader, first, rows)
        self._parsed.append((opened, number))
        if len(self._parsed) > self._most_blocks:
            old, gone = self._parsed.popleft()
            old.blocks.pop(gone, None)
        self._opened.move_to_end(shard)
        return block

    def _open(self, shard: int) -> _Opened:
        info = self._info(shard)
        for attempt in range(1, OPEN_TRIES + 1):
            try:
                opened = self._opened[shard] = _Opened(ShardReader(self._open_shard(info), info), info.rows)
                break
            except QuarantinedShard:
                masked = self._masked[shard] = _Opened(None, info.rows)
                return masked
            except FileNotFoundError:
                # A full cache may evict the file between its path being told and its being mapped.
                if attempt == OPEN_TRIES:
                    raise
        self._bytes += info.bytes
        while len(self._opened) > 1 and self._too_many():
            self._close_oldest()
        return opened

    def _too_many(self) -> bool:
        return len(self._opened) > self._most_maps or (self._most_bytes is not None and self._bytes > self._most_bytes)

    def _close_oldest(self) -> None:
        # Its record batches go with it: they are views of the map and would keep it open.
        number, old = self._opened.popitem(last=False)
        old.blocks.clear()
        old.reader.close()
        info = self._info(number)
        self._bytes -= info.bytes
        if self._release is not None:
            self._release(info)
