"""The table of a manifest's shards: an Arrow IPC file of one row per shard, memory-mapped, checked as it is read.

The file is cut into blocks of at most BLOCK_SHARDS shards of one corpus, each an Arrow record batch. Where the blocks
lie and what their digests are stands in manifest.json, so opening reads nothing of the table, and nothing of it is
parsed before it was compared with its digest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import xxhash

from cluster.storage import Storage
from configs.errors import DataError
from data.arrow_file import DigestingWriter, mapped, view

BLOCK_SHARDS = 256
COPY_BYTES = 1 << 20

SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("corpus", pa.int32()),
            ("path", pa.string()),
            ("first_row", pa.int64()),
            ("rows", pa.int64()),
            ("source_tokens", pa.int64()),
            ("target_tokens", pa.int64()),
            ("bytes", pa.int64()),
            ("digest", pa.binary(16)),
            ("batch_offsets", pa.list_(pa.field("item", pa.int64(), nullable=False))),
            ("batch_bytes", pa.list_(pa.field("item", pa.int64(), nullable=False))),
            ("batch_digests", pa.list_(pa.field("item", pa.uint64(), nullable=False))),
        )
    ]
)


class RecordBatch(NamedTuple):
    """Place of one record batch in its file, bytes from the start, and the xxh3-64 of those bytes as a number."""

    offset: int
    bytes: int
    digest: int


class RecordBatches(Sequence[RecordBatch]):
    """Record batches of one shard as three arrays `[batches]`, views of the table; equal to a tuple of the same."""

    def __init__(self, offsets: np.ndarray, sizes: np.ndarray, digests: np.ndarray) -> None:
        self._columns = (offsets, sizes, digests)

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, at: int) -> RecordBatch: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[RecordBatch, ...]: ...
    def __getitem__(self, at):
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        return RecordBatch(*(int(column[at]) for column in self._columns))

    def __iter__(self) -> Iterator[RecordBatch]:
        return map(RecordBatch, *(column.tolist() for column in self._columns))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, RecordBatches | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True)
class ShardInfo:
    """One file: `path` relative to the data folder, `digest` xxh3-128 in hex. Token counts are of all rows.

    `batches` are the Arrow record batches of a shard, in order; files of other kinds have none. A list of lists, as
    JSON gives them, is taken too.
    """

    path: str
    rows: int
    source_tokens: int
    target_tokens: int
    bytes: int
    digest: str
    batches: Sequence[RecordBatch] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.batches, RecordBatches):
            object.__setattr__(self, "batches", tuple(RecordBatch(*batch) for batch in self.batches))


@dataclass(frozen=True)
class TableBlock:
    """Some shards of one corpus in the table: how many, the first one's first row, and where they lie."""

    shards: int
    first_row: int
    offset: int
    bytes: int
    digest: str


class _Columns:
    """One block, read: columns as views of the table."""

    def __init__(self, content: pa.Buffer) -> None:
        batch = pa.ipc.read_record_batch(content, SCHEMA)
        self.first_row = view(batch["first_row"])
        self._paths, self._digests = batch["path"], batch["digest"]
        self._numbers = [view(batch[name]) for name in ("rows", "source_tokens", "target_tokens", "bytes")]
        lists = [batch[name] for name in ("batch_offsets", "batch_bytes", "batch_digests")]
        self._batch_ends = view(lists[0].offsets)
        self._batches = [view(column.values) for column in lists]

    def shard(self, at: int) -> ShardInfo:
        part = slice(self._batch_ends[at], self._batch_ends[at + 1])
        return ShardInfo(
            self._paths[at].as_py(),
            *(int(column[at]) for column in self._numbers),
            self._digests[at].as_py().hex(),
            RecordBatches(*(column[part] for column in self._batches)),
        )


class ShardTable:
    """An open table. Local files are mapped; others are fetched once, to a file without a name that is mapped.

    A copy sent to another process is opened there anew. Raises DataError when the file is absent or has another size
    than `size` bytes, and from any later use that meets a block that does not match its digest.
    """

    def __init__(self, storage: Storage, path: str, size: int, blocks: tuple[tuple[TableBlock, ...], ...]) -> None:
        self._storage, self._path, self._size, self.blocks = storage, path, size, blocks
        self._read: dict[tuple[int, int], _Columns] = {}
        try:
            self._content = self._map()
        except FileNotFoundError as error:
            raise DataError(f"{self} does not exist; remove the folder and prepare the data again") from error
        if self._content.size != size:
            raise DataError(
                f"{self}: {self._content.size} bytes, the manifest says {size}; remove the folder and prepare again"
            )

    def __str__(self) -> str:
        return f"{self._storage.url}/{self._path}"

    def __reduce__(self) -> tuple:
        return ShardTable, (self._storage, self._path, self._size, self.blocks)

    def _map(self) -> pa.Buffer:
        path = self._storage.local_path(self._path)
        if path is not None:
            return mapped(path)
        with self._storage.open(self._path) as source, tempfile.NamedTemporaryFile(prefix="telar-table-") as file:
            shutil.copyfileobj(source, file, COPY_BYTES)
            file.flush()
            return mapped(file.name)

    def columns(self, corpus: int, number: int) -> _Columns:
        """Block `number` of a corpus."""
        found = self._read.get((corpus, number))
        if found is None:
            block = self.blocks[corpus][number]
            content = self._content.slice(block.offset, block.bytes)
            if content.size != block.bytes or xxhash.xxh3_128_hexdigest(content) != block.digest:
                raise DataError(
                    f"{self}: bytes {block.offset} to {block.offset + block.bytes} do not match their digest; remove "
                    "the folder and prepare the data again"
                )
            found = self._read[corpus, number] = _Columns(content)
        return found


class TableShards(Sequence[ShardInfo]):
    """The shards of one corpus, read from the table when they are asked for; equal to a tuple of the same."""

    def __init__(self, table: ShardTable, corpus: int) -> None:
        self._table, self._corpus = table, corpus
        blocks = table.blocks[corpus]
        self._first_shards = np.cumsum([0, *(block.shards for block in blocks)])
        self._first_rows = np.array([block.first_row for block in blocks], dtype=np.int64)

    def __reduce__(self) -> tuple:
        return TableShards, (self._table, self._corpus)

    def __len__(self) -> int:
        return int(self._first_shards[-1])

    @overload
    def __getitem__(self, at: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[ShardInfo, ...]: ...
    def __getitem__(self, at):
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        at = range(len(self))[at]
        block = int(np.searchsorted(self._first_shards, at, side="right")) - 1
        return self._table.columns(self._corpus, block).shard(at - int(self._first_shards[block]))

    def __iter__(self) -> Iterator[ShardInfo]:
        for number, block in enumerate(self._table.blocks[self._corpus]):
            columns = self._table.columns(self._corpus, number)
            yield from (columns.shard(at) for at in range(block.shards))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TableShards | tuple):
            return NotImplemented
        if isinstance(other, TableShards):
            mine, theirs = (each._table.blocks[each._corpus] for each in (self, other))
            return [block.digest for block in mine] == [block.digest for block in theirs]
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the shard, row in it), both int64 like `rows`: a binary search for the block, then in it."""
        blocks = np.searchsorted(self._first_rows, rows, side="right") - 1
        shards, inside = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        order = np.argsort(blocks, kind="stable")
        numbers, starts = np.unique(blocks[order], return_index=True)
        for number, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            part = order[start:end]
            first_row = self._table.columns(self._corpus, number).first_row
            found = np.searchsorted(first_row, rows[part], side="right") - 1
            shards[part], inside[part] = found + self._first_shards[number], rows[part] - first_row[found]
        return shards, inside


def write_table(
    storage: Storage, path: str, corpora: Iterable[Iterable[ShardInfo]]
) -> tuple[int, tuple[tuple[TableBlock, ...], ...]]:
    """Write the shards of all corpora as one file, a block at a time; returns its bytes and each corpus's blocks."""
    blocks: list[tuple[TableBlock, ...]] = []
    with storage.open(path, "wb") as file, DigestingWriter(file, SCHEMA) as writer:
        for number, shards in enumerate(corpora):
            blocks.append(tuple(_write_blocks(writer, number, iter(shards))))
    return writer.bytes, tuple(blocks)


def _write_blocks(writer: DigestingWriter, corpus: int, shards: Iterator[ShardInfo]) -> Iterator[TableBlock]:
    first_row = 0
    while block := list(islice(shards, BLOCK_SHARDS)):
        rows = [shard.rows for shard in block]
        firsts = first_row + np.cumsum([0, *rows[:-1]])
        values: dict[str, Any] = {name: [getattr(shard, name) for shard in block] for name in SCHEMA.names[3:7]}
        values |= {
            "corpus": [corpus] * len(block),
            "path": [shard.path for shard in block],
            "first_row": firsts,
            "digest": [bytes.fromhex(shard.digest) for shard in block],
            "batch_offsets": [[batch.offset for batch in shard.batches] for shard in block],
            "batch_bytes": [[batch.bytes for batch in shard.batches] for shard in block],
            "batch_digests": [[batch.digest for batch in shard.batches] for shard in block],
        }
        columns = [pa.array(values[each.name], each.type) for each in SCHEMA]
        digest = xxhash.xxh3_128()
        offset, size = writer.write(pa.record_batch(columns, schema=SCHEMA), digest)
        yield TableBlock(len(block), first_row, offset, size, digest.hexdigest())
        first_row += sum(rows)
