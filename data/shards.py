"""Reading shard files (data/shard_writer.py says what is in them) through a memory map.

A record batch is compared with its digest when its tokens are first used, so a damaged one is named and never read.
Per record batch a reader keeps eight numbers; arrays are views of the map, without Arrow objects in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from configs.errors import DataError
from data.arrow_file import MAGIC_BYTES, mapped, read_soon, view
from data.shard_table import ShardInfo
from data.shard_writer import shard_schema, token_type, write_shard

__all__ = ["Row", "Samples", "ShardReader", "file_digest", "gather", "token_type", "write_shard"]

# Larger pieces would each be new memory of the kernel's, which takes five times as long as hashing.
DIGEST_CHUNK_BYTES = 1 << 18
SCHEMAS = {np.uint16: shard_schema(pa.uint16()), np.uint32: shard_schema(pa.uint32())}
SOURCE, SOURCE_LENGTHS, TARGET, TARGET_LENGTHS = range(4)

# Source tokens, source lengths, label tokens, label lengths.
Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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
    """Rows of one shard file on a local disk; token arrays are views of the memory map.

    Opening compares size, header, footer, schema and record batches with `info`. With `check`, a record batch is
    compared with its digest before its tokens are first read. Whatever is wrong raises DataError naming the shard. A
    file must not be changed or cut while it is open; one that is replaced or removed stays readable.

    `tokens` (uint16 or uint32) and `numbers` (int32) are views of the whole file, which `spans` points into.
    """

    def __init__(self, path: str, info: ShardInfo, check: bool = True) -> None:
        self._path, self._info = path, info
        self._content = mapped(path)
        if self._content.size != info.bytes:
            raise self._damaged(
                f"is no Arrow file of {info.bytes} bytes as the manifest says, but {self._content.size}"
            )
        self.token_type = self._check_frame()
        self._checked = np.full(len(info.batches), not check)
        self._located = np.zeros(len(info.batches), dtype=bool)
        # Where the offsets and the values of each column start in `numbers` and in its values' view: [batches, 4, 2].
        self._starts = np.zeros((len(info.batches), 4, 2), dtype=np.int64)
        self.tokens, self.numbers = (self._view(kind) for kind in (self.token_type, np.int32))

    def _check_frame(self) -> type[np.unsignedinteger]:
        """Header and footer; returns the type of tokens and sets the number of rows in a record batch."""
        info = self._info
        try:
            header = pa.ipc.read_schema(self._content.slice(MAGIC_BYTES))
            with pa.ipc.open_file(self._content) as file:
                count, footer = file.num_record_batches, file.schema
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(f"is no Arrow file ({error})") from error
        if not self._content.slice(0, MAGIC_BYTES).to_pybytes().startswith(b"ARROW1"):
            raise self._damaged("is no Arrow file (it does not begin with ARROW1)")
        kinds = [kind for kind, schema in SCHEMAS.items() if header == schema and footer == schema]
        if not kinds:
            raise self._damaged("holds other columns than a shard")
        if count == 0 or count != len(info.batches):
            raise self._damaged(f"holds {count} record batches, the manifest says {len(info.batches)}")
        if any(batch.offset < 0 or batch.offset + batch.bytes > info.bytes for batch in info.batches):
            raise self._damaged("is shorter than its record batches")
        self._schema = SCHEMAS[kinds[0]]
        self._block_rows = self._parse(0).num_rows
        last = self._parse(count - 1).num_rows
        if self._block_rows * (count - 1) + last != info.rows:
            raise self._damaged(f"does not hold {info.rows} rows as the manifest says")
        return kinds[0]

    def _parse(self, batch: int) -> pa.RecordBatch:
        try:
            parsed = pa.ipc.read_record_batch(self._batch_content(batch), self._schema)
            parsed.validate()
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(f"cannot be read (record batch {batch}: {error})") from error
        return parsed

    def _batch_content(self, batch: int) -> pa.Buffer:
        place = self._info.batches[batch]
        return self._content.slice(place.offset, place.bytes)

    def _view(self, kind: type[np.integer]) -> np.ndarray:
        return np.frombuffer(self._content, dtype=kind, count=self._content.size // np.dtype(kind).itemsize)

    def _locate(self, batch: int) -> None:
        """Note where the columns of a record batch lie, after a check that its offsets ascend within the values."""
        parsed = self._parse(batch)
        expected = min(self._block_rows, self._info.rows - batch * self._block_rows)
        if parsed.num_rows != expected:
            raise self._damaged(f"has {parsed.num_rows} rows in record batch {batch}, {expected} expected")
        starts = np.zeros((4, 2), dtype=np.int64)
        for number, column in enumerate(parsed.columns):
            buffers = column.buffers()
            offsets = view(column.offsets)
            if column.null_count or offsets[0] != 0 or np.diff(offsets).min() < 0 or offsets[-1] > len(column.values):
                raise self._damaged(f"has offsets out of order in record batch {batch}")
            width = column.values.type.bit_width // 8
            for at, buffer, size in ((0, buffers[1], 4), (1, buffers[3], width)):
                # A column without any value may have no buffer; nothing is read through its start.
                starts[number, at] = (buffer.address - self._content.address) // size if buffer else 0
        self._starts[batch] = starts
        self._located[batch] = True

    @property
    def block_rows(self) -> int:
        """Rows of each record batch but the last, which may have fewer."""
        return self._block_rows

    def spans(self, rows: np.ndarray, tokens_follow: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of rows, int64 `[4, n]` each: places in `tokens` (0: source, 2: labels) and in `numbers`.

        Row 1 points to the lengths of the pairs' sources, row 3 to those of their labels, both in `numbers`.
        Without `tokens_follow` record batches are not compared with their digests first.
        """
        rows = np.asarray(rows, dtype=np.int64)
        assert not len(rows) or (rows.min() >= 0 and rows.max() < self._info.rows), "no such row"
        batches = rows // self._block_rows
        if tokens_follow and not self._checked[batches].all():
            for batch in np.unique(batches[~self._checked[batches]]).tolist():
                self.verify_batch(batch)
        if not self._located[batches].all():
            for batch in np.unique(batches[~self._located[batches]]).tolist():
                self._locate(batch)
        starts = self._starts[batches]
        at = starts[:, :, 0].T + rows % self._block_rows
        values = starts[:, :, 1].T
        return values + self.numbers[at], values + self.numbers[at + 1]

    def rows(self, rows: np.ndarray) -> list[Row]:
        """Source tokens, source lengths, label tokens, label lengths of each row, as views of the map."""
        starts, ends = (bounds.tolist() for bounds in self.spans(rows))
        tokens, numbers = self.tokens, self.numbers
        return [
            (tokens[a:b], numbers[c:d], tokens[e:f], numbers[g:h])
            for a, b, c, d, e, f, g, h in zip(
                *(bound for pair in zip(starts, ends, strict=True) for bound in pair), strict=True
            )
        ]

    def row(self, row: int) -> Row:
        """The same of one row."""
        return self.rows(np.array([row]))[0]

    def lengths(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source tokens and label tokens of rows, int64 `[n]` each, from the offsets alone: no token is touched.

        Offsets are checked for order, not against the digest; reading the rows does that.
        """
        starts, ends = self.spans(rows, tokens_follow=False)
        return ends[SOURCE] - starts[SOURCE], ends[TARGET] - starts[TARGET]

    def verify_batch(self, batch: int) -> None:
        """Compare one record batch, its message header included, with its digest; raises DataError."""
        content = self._batch_content(batch)
        read_soon(content)
        if xxhash.xxh3_64_intdigest(content) != self._info.batches[batch].digest:
            raise self._damaged(f"does not match its digest in record batch {batch}")
        self._checked[batch] = True

    def verify(self) -> None:
        """Compare the whole file with its digest; raises DataError."""
        if xxhash.xxh3_128_hexdigest(self._content) != self._info.digest:
            raise self._damaged("does not match its digest")
        self._checked[:] = True

    def close(self) -> None:
        """Let go of the map; it ends when no array that was handed out is left. No method may be called after."""
        del self._content, self.tokens, self.numbers

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"shard {self._info.path}: {self._path} {what}; remove the file, then run the prepare stage again where "
            "this is its only copy"
        )


def gather(rows: Sequence[Row]) -> Samples:
    """Rows as read by `ShardReader.rows`, copied into one set of arrays."""
    source, source_lengths, target, target_lengths = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return Samples(source, source_lengths, target, target_lengths, np.array([len(row[1]) for row in rows]))
