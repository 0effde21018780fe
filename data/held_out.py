"""Held-out records: which ones they are, and reading them back for evaluation.

Whole files are held out, by a hash of their path, so that neighbouring text never stands on both sides; a corpus of
one file is split by a hash of each record's content, so that equal records never do. `held_out_key` has the hash of
one field decide instead, and `held_out` names files of held-out records.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cluster.storage import Storage
from configs.errors import DataError
from data.arrow_file import DigestingSink
from data.manifest import Manifest, ShardInfo

# Text that is held in memory before it is written, characters; bytes that are read at one time.
FLUSH_CHARACTERS = 1 << 20
READ_BYTES = 1 << 20
SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("fields", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class HeldOut:
    """One held-out record: its number in the corpus's file, rendered texts, and the record's own fields."""

    index: int
    source: str
    target: str
    fields: dict[str, str]


def share_of(text: str) -> float:
    """A hash of `text` as a number in [0, 1)."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64


def held_out_files(paths: Sequence[str], fraction: float, sizes: Sequence[int] | None = None) -> frozenset[str]:
    """Relative paths that are kept for evaluation: those whose hash lies below `fraction`.

    Of two files or more at least one is held out and at least one is not, unless the fraction is 0. A file that is
    more than half of all bytes (`sizes`) is always trained on.
    """
    if fraction == 0.0 or len(paths) < 2:
        return frozenset()
    sizes = [0] * len(paths) if sizes is None else sizes
    candidates = [path for path, size in zip(paths, sizes, strict=True) if 2 * size <= sum(sizes)]
    by_hash = sorted(candidates, key=lambda path: (share_of(path), path))
    count = sum(share_of(path) < fraction for path in candidates)
    return frozenset(by_hash[: min(max(count, 1), len(paths) - 1)])


def is_held_out_record(record: Mapping[str, str | bytes], fraction: float, key: str | None) -> bool:
    """Whether a record is kept for evaluation by a hash of its field `key` (None: of all fields); equal ones agree."""
    if fraction == 0.0:
        return False
    text = json.dumps(record, sort_keys=True, default=xxhash.xxh3_128_hexdigest) if key is None else record[key]
    return share_of(text) < fraction


def record_row(source: str, target: str, fields: Mapping[str, str | bytes]) -> dict[str, str]:
    """One row of a held-out file; fields that are no text (images) are left out."""
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    return {"source": source, "target": target, "fields": json.dumps(texts, ensure_ascii=False)}


class HeldOutWriter:
    """Writes one Parquet file of rows made by `record_row`, about FLUSH_CHARACTERS of them in memory at a time.

    A context: without `close` nothing is left behind.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._path, self.rows = path, 0
        self._file = ExitStack()
        self._sink = DigestingSink(self._file.enter_context(storage.open(path, "wb")))
        self._writer = pq.ParquetWriter(pa.PythonFile(self._sink, mode="w"), SCHEMA, compression="zstd")
        self._pending: list[Mapping[str, str]] = []
        self._characters = 0

    def add(self, row: Mapping[str, str]) -> None:
        """Append one row."""
        self._pending.append(row)
        self.rows += 1
        self._characters += sum(map(len, row.values()))
        if self._characters >= FLUSH_CHARACTERS:
            self._flush()

    def close(self) -> ShardInfo:
        """Write what is left; the file's description."""
        if self._pending or not self.rows:
            self._flush()
        self._writer.close()
        self._file.close()
        return ShardInfo(self._path, self.rows, 0, 0, self._sink.bytes, self._sink.digest)

    def __enter__(self) -> HeldOutWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        # After `close` both do nothing; before it the file is thrown away with what the writer still writes.
        self._writer.close()
        self._file.__exit__(*error)

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=SCHEMA))
        self._pending, self._characters = [], 0


def iterate_rows(storage: Storage, file: ShardInfo) -> Iterator[dict[str, str]]:
    """Rows of a file written by `HeldOutWriter`, a row group in memory at a time.

    Raises DataError when it is missing or damaged.
    """
    url = f"{storage.url}/{file.path}"
    try:
        with storage.open(file.path) as source:
            digest = xxhash.xxh3_128()
            while chunk := source.read(READ_BYTES):
                digest.update(chunk)
            if digest.hexdigest() != file.digest:
                raise DataError(f"{url}: content does not match its digest; remove it and prepare again")
            source.seek(0)
            parquet = pq.ParquetFile(source)
            for number in range(parquet.num_row_groups):
                yield from parquet.read_row_group(number).to_pylist()
    except FileNotFoundError as error:
        raise DataError(f"{url}: held-out records are missing; prepare the data again") from error


def read_records(storage: Storage, manifest: Manifest, corpus_name: str, limit: int, seed: int) -> list[HeldOut]:
    """At most `limit` held-out records of a corpus, chosen by a hash of (seed, index), in the order of their index.

    The same arguments give the same records, and a smaller limit gives a subset. Raises DataError when the file is
    missing or damaged.
    """
    file = manifest.corpus(corpus_name).held_out
    chosen = set(heapq.nsmallest(limit, range(file.rows), key=lambda index: (share_of(f"{seed}/{index}"), index)))
    return [
        HeldOut(index, row["source"], row["target"], json.loads(row["fields"]))
        for index, row in enumerate(iterate_rows(storage.child(manifest.folder), file))
        if index in chosen
    ]
