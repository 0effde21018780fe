"""Shard files: Arrow IPC file format, uncompressed, one row per packed sample, read through a memory map.

Columns: `source` and `target` list<uint16 or uint32> (token ids of all pairs of the sample, one after the other; the
target column holds labels, with eos where a text ends), `source_lengths` and `target_lengths` list<int32> (tokens of
each pair). A record batch holds `block_rows` rows, the last one maybe fewer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import ShardInfo
from data.packing import Pair

DIGEST_CHUNK_BYTES = 1 << 22


def token_type(vocabulary_size: int) -> pa.DataType:
    """The smallest of uint16 and uint32 that holds every id."""
    return pa.uint16() if vocabulary_size <= 1 << 16 else pa.uint32()


def write_shard(
    storage: Storage, path: str, samples: Sequence[Sequence[Pair]], vocabulary_size: int, block_rows: int
) -> ShardInfo:
    """Write samples as one file at `path`, whole or not at all; equal samples give equal bytes."""
    token = token_type(vocabulary_size)
    schema = pa.schema(
        [
            ("source", pa.list_(pa.field("item", token, nullable=False))),
            ("source_lengths", pa.list_(pa.field("item", pa.int32(), nullable=False))),
            ("target", pa.list_(pa.field("item", token, nullable=False))),
            ("target_lengths", pa.list_(pa.field("item", pa.int32(), nullable=False))),
        ]
    )
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema) as writer:
        for start in range(0, len(samples), block_rows):
            block = samples[start : start + block_rows]
            columns = []
            for side in (0, 1):
                columns.append(_lists([[pair[side] for pair in sample] for sample in block], schema.types[2 * side]))
                lengths = [[np.array([len(pair[side]) for pair in sample])] for sample in block]
                columns.append(_lists(lengths, schema.types[2 * side + 1]))
            writer.write_batch(pa.record_batch(columns, schema=schema))
    content = buffer.getvalue()
    storage.write_bytes(path, content)
    source, target = (sum(len(pair[side]) for sample in samples for pair in sample) for side in (0, 1))
    return ShardInfo(path, len(samples), source, target, len(content), xxhash.xxh3_128_hexdigest(content))


def _lists(rows: Sequence[Sequence[np.ndarray]], kind: pa.ListType) -> pa.ListArray:
    sizes = [sum(len(part) for part in row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    values = np.concatenate([part for row in rows for part in row])
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values.astype(kind.value_type.to_pandas_dtype())), type=kind
    )


def file_digest(path: str) -> str:
    """xxh3-128 of a local file, hex."""
    digest = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Samples:
    """Some rows of shards, concatenated: tokens `[tokens]`, lengths `[pairs]`, pairs of each row `[rows]`."""

    source: np.ndarray
    source_lengths: np.ndarray
    target: np.ndarray
    target_lengths: np.ndarray
    pairs: np.ndarray


class ShardReader:
    """Rows of one shard file on a local disk; token arrays are views of the memory map."""

    def __init__(self, path: str, info: ShardInfo) -> None:
        self._info = info
        try:
            self._file = pa.ipc.open_file(pa.memory_map(path))
            first = self._file.get_batch(0)
        except pa.ArrowInvalid as error:
            raise DataError(f"shard {info.path}: {path} is no Arrow file ({error})") from error
        self._block_rows = first.num_rows
        self._blocks: dict[int, tuple[tuple[np.ndarray, np.ndarray], ...]] = {}

    @property
    def block_rows(self) -> int:
        """Rows of each record batch but the last, which may have fewer."""
        return self._block_rows

    def block(self, number: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Offsets and values of each column of a record batch, without a copy; row i is values[o[i]:o[i + 1]]."""
        return tuple(_offsets_and_values(column) for column in self._file.get_batch(number).columns)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Source tokens, source lengths, label tokens, label lengths of one row, without a copy."""
        assert 0 <= row < self._info.rows
        block, at = divmod(row, self._block_rows)
        if block not in self._blocks:
            self._blocks[block] = self.block(block)
        return tuple(values[offsets[at] : offsets[at + 1]] for offsets, values in self._blocks[block])


def _offsets_and_values(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Views of a column's buffers; Arrow's own conversions import pandas first, which takes a quarter of a second."""
    _, offsets, _, values = column.buffers()
    kind = np.dtype(str(column.type.value_type))
    offsets = np.frombuffer(offsets, dtype=np.int32, count=len(column) + 1)
    if values is None:
        return offsets, np.empty(0, dtype=kind)
    return offsets, np.frombuffer(values, dtype=kind, count=int(offsets[-1]))


def gather(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> Samples:
    """Rows as read by `ShardReader.row`, copied into one set of arrays."""
    source, source_lengths, target, target_lengths = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return Samples(source, source_lengths, target, target_lengths, np.array([len(row[1]) for row in rows]))
