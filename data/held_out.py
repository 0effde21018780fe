"""Held-out records: which ones they are, and reading them back for evaluation.

Whole files are held out, by a hash of their path, so that neighbouring text never stands on both sides; a corpus of
one file is split by a hash of each record's content, so that equal records never do. `held_out_key` has the hash of
one field decide instead, and `held_out` names files of held-out records.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import Manifest, ShardInfo

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


def held_out_files(paths: Sequence[str], fraction: float) -> frozenset[str]:
    """Relative paths that are kept for evaluation: those whose hash lies below `fraction`.

    Of two files or more at least one is held out and at least one is not, unless the fraction is 0.
    """
    if fraction == 0.0 or len(paths) < 2:
        return frozenset()
    by_hash = sorted(paths, key=lambda path: (share_of(path), path))
    count = sum(share_of(path) < fraction for path in paths)
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


def write_records(storage: Storage, path: str, rows: Iterable[Mapping[str, str]]) -> ShardInfo:
    """Write one Parquet file of rows made by `record_row`."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue()
    storage.write_bytes(path, content)
    return ShardInfo(path, table.num_rows, 0, 0, len(content), xxhash.xxh3_128_hexdigest(content))


def read_rows(storage: Storage, file: ShardInfo) -> list[dict[str, str]]:
    """All rows of a file written by `write_records`; raises DataError when it is missing or damaged."""
    try:
        content = storage.read_bytes(file.path)
    except FileNotFoundError as error:
        raise DataError(f"{storage.url}/{file.path}: held-out records are missing; prepare the data again") from error
    if xxhash.xxh3_128_hexdigest(content) != file.digest:
        raise DataError(f"{storage.url}/{file.path}: content does not match its digest; remove it and prepare again")
    return pq.read_table(io.BytesIO(content), schema=SCHEMA).to_pylist()


def read_records(storage: Storage, manifest: Manifest, corpus_name: str, limit: int, seed: int) -> list[HeldOut]:
    """At most `limit` held-out records of a corpus, chosen by a hash of (seed, index), in the order of their index.

    The same arguments give the same records, and a smaller limit gives a subset. Raises DataError when the file is
    missing or damaged.
    """
    rows = read_rows(storage.child(manifest.folder), manifest.corpus(corpus_name).held_out)
    chosen = sorted(range(len(rows)), key=lambda index: (share_of(f"{seed}/{index}"), index))[:limit]
    return [
        HeldOut(index, rows[index]["source"], rows[index]["target"], json.loads(rows[index]["fields"]))
        for index in sorted(chosen)
    ]
