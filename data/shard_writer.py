"""Writing shard files: Arrow IPC, uncompressed, one row per packed sample, one record batch after the other.

Columns: `source` and `target` list<uint16 or uint32> (token ids of all pairs of the sample, one after the other; the
target column holds labels, with eos where a text ends), `source_lengths` and `target_lengths` list<int32> (tokens of
each pair). A record batch holds `block_rows` rows, the last one maybe fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import xxhash

from cluster.storage import Storage
from data.arrow_file import DigestingWriter
from data.packing import Pair
from data.shard_table import RecordBatch, ShardInfo


def token_type(vocabulary_size: int) -> pa.DataType:
    """The smallest of uint16 and uint32 that holds every id."""
    return pa.uint16() if vocabulary_size <= 1 << 16 else pa.uint32()


def shard_schema(token: pa.DataType) -> pa.Schema:
    """The schema of a shard with tokens of that type."""
    tokens, lengths = (pa.list_(pa.field("item", kind, nullable=False)) for kind in (token, pa.int32()))
    return pa.schema([("source", tokens), ("source_lengths", lengths), ("target", tokens), ("target_lengths", lengths)])


def write_shard(
    storage: Storage, path: str, samples: Iterable[Sequence[Pair]], vocabulary_size: int, block_rows: int
) -> ShardInfo:
    """Write samples as one file at `path`, whole or not at all; equal samples give equal bytes.

    Takes from `samples` and keeps in memory `block_rows` of them at a time.
    """
    schema = shard_schema(token_type(vocabulary_size))
    rows = source_tokens = target_tokens = 0
    batches: list[RecordBatch] = []
    remaining = iter(samples)
    with storage.open(path, "wb") as file, DigestingWriter(file, schema) as writer:
        while block := list(islice(remaining, block_rows)):
            columns = []
            for side in (0, 1):
                parts = [[pair[side] for pair in sample] for sample in block]
                columns.append(_lists(parts, schema.types[2 * side]))
                lengths = [[np.array([len(part) for part in row], dtype=np.int32)] for row in parts]
                columns.append(_lists(lengths, schema.types[2 * side + 1]))
            digest = xxhash.xxh3_64()
            offset, size = writer.write(pa.record_batch(columns, schema=schema), digest)
            batches.append(RecordBatch(offset, size, digest.intdigest()))
            rows += len(block)
            source_tokens += len(columns[0].values)
            target_tokens += len(columns[2].values)
    return ShardInfo(path, rows, source_tokens, target_tokens, writer.bytes, writer.digest, tuple(batches))


def _lists(rows: Sequence[Sequence[np.ndarray]], kind: pa.ListType) -> pa.ListArray:
    sizes = [sum(map(len, row)) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    values = np.concatenate([np.empty(0, np.int32), *chain.from_iterable(rows)])
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values.astype(kind.value_type.to_pandas_dtype())), type=kind
    )
