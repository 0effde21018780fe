"""Records of tables: delimited text (CSV, TSV), Parquet and Arrow IPC, a batch of rows at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import DataError
from data.json_source import as_text

BATCH_ROWS = 256
READ_BYTES = 1 << 20
MOST_FIELD_CHARACTERS = 64 * 2**20
ARROW_FILE_MAGIC = b"ARROW1"


def delimited(
    lines: Iterable[str], separator: str, quotes: bool, columns: Sequence[str], origin: str
) -> Iterator[dict[str, str]]:
    """Records of delimited lines; `columns` are their names when the first line is no header.

    Quoted values may hold separators, doubled quotes and line ends (RFC 4180). Raises DataError, `origin` in front,
    naming the line: another number of values than columns, or a quote that does not end.
    """
    # The module's limit of 131,072 characters is a setting of the whole process; long documents exceed it.
    csv.field_size_limit(max(csv.field_size_limit(), MOST_FIELD_CHARACTERS))
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    rows = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    names = list(columns)
    try:
        for row in rows:
            if not row:
                continue
            if not names:
                names = row
                twice = sorted({name for name in names if names.count(name) > 1})
                if twice:
                    raise DataError(
                        f"{origin} line {rows.line_num} names the column {twice[0]!r} twice; rename one, or name all "
                        "columns in `columns` when the first line is no header"
                    )
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{origin} line {rows.line_num} has {len(row)} values, there are {len(names)} columns "
                    f"({', '.join(names)}); mend the line, set quotes: {str(not quotes).lower()}, or correct `columns`"
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{origin} line {rows.line_num}: {error}; mend the line, or set quotes: false when quote characters are "
            "ordinary text there"
        ) from error


def parquet_tables(stream: IO[bytes], origin: str) -> Iterator[pa.Table]:
    """Small tables of a Parquet file, read READ_BYTES of a column at a time; raises DataError for another file."""
    try:
        # By default iter_batches reads all row groups ahead, that is the whole file.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=READ_BYTES)
        columns = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{origin} is no whole Parquet file ({_short(error)}); replace or exclude it") from error


def arrow_tables(stream: IO[bytes], origin: str) -> Iterator[pa.Table]:
    """Small tables of an Arrow IPC file or stream; raises DataError for another file."""
    try:
        start = stream.read(len(ARROW_FILE_MAGIC))
        stream.seek(0)
        if start == ARROW_FILE_MAGIC:
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stream))
        for batch in batches:
            for at in range(0, batch.num_rows, BATCH_ROWS):
                yield pa.Table.from_batches([batch.slice(at, BATCH_ROWS)])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{origin} is no whole Arrow IPC file or stream ({_short(error)}); replace or exclude it"
        ) from error


def table_records(tables: Iterable[pa.Table]) -> Iterator[dict[str, str]]:
    """Records of tables; columns that hold binary values are left out."""
    for table in tables:
        kept = table.select([field.name for field in table.schema if not _is_binary(field.type)])
        for row in kept.to_pylist():
            yield {name: as_text(value) for name, value in row.items()}


def _is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes, or hold bytes somewhere inside (an image is a struct of bytes and a path)."""
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_is_binary(kind.field(number).type) for number in range(kind.num_fields))


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
