"""Records of Parquet and Arrow IPC files, a few rows at a time; image columns as bytes where they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import DataError
from data.delimited import repeated
from data.json_source import as_text
from data.opening import said

BATCH_ROWS = 256
BATCH_BYTES = 16 * 2**20
READ_BYTES = 1 << 20
ARROW_FILE_MAGIC = b"ARROW1"


def parquet_tables(stream: IO[bytes], origin: str, binary: Collection[str] = ()) -> Iterator[pa.Table]:
    """Tables of at most BATCH_ROWS rows of a Parquet file; raises DataError for another file.

    A table holds about BATCH_BYTES at most, or one row; of a column READ_BYTES are read at a time, or a page of the
    file where that is larger. Columns of binary values are not read, but for those named in `binary`.
    """
    with _whole(origin, "Parquet file"):
        # By default iter_batches reads all row groups ahead, that is the whole file.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=READ_BYTES)
        columns = _columns(file.schema_arrow, origin, binary)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        # Sizes count all columns: a file with large images gives small tables of its captions too, which costs little.
        row_bytes = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1)
        for batch in file.iter_batches(max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, row_bytes)))), columns=columns):
            yield pa.Table.from_batches([batch])


def arrow_tables(stream: IO[bytes], origin: str, binary: Collection[str] = ()) -> Iterator[pa.Table]:
    """Tables of at most BATCH_ROWS rows of an Arrow IPC file or stream; raises DataError for another file.

    Memory is that of one record batch, as the file was written, without columns of binary values that are not named in
    `binary`.
    """
    with _whole(origin, "Arrow IPC file or stream"):
        start = stream.read(len(ARROW_FILE_MAGIC))
        stream.seek(0)
        reader = pa.ipc.open_file if start == ARROW_FILE_MAGIC else pa.ipc.open_stream
        schema = reader(stream).schema
        names = _columns(schema, origin, binary)
        stream.seek(0)
        opened = reader(stream, options=pa.ipc.IpcReadOptions(included_fields=[schema.names.index(n) for n in names]))
        batches = (
            (opened.get_batch(number) for number in range(opened.num_record_batches))
            if start == ARROW_FILE_MAGIC
            else iter(opened)
        )
        for batch in batches:
            for at in range(0, batch.num_rows, BATCH_ROWS):
                yield pa.Table.from_batches([batch.slice(at, BATCH_ROWS)])


def table_records(
    tables: Iterable[pa.Table], origin: str, binary: Collection[str] = ()
) -> Iterator[dict[str, str | bytes]]:
    """Records of tables; columns of binary values are left out, but for those named in `binary`.

    Of those each value is bytes, copied out of the table when its record is asked for: the value itself, or `bytes`
    of a struct of bytes and path as the `datasets` library stores images; null is b"". A struct that has a path alone
    gives what that file holds. Raises DataError for text that is no UTF-8 and for a column that holds no bytes.
    """
    for table in tables:
        names = _columns(table.schema, origin, binary)
        texts = table.select([name for name in names if name not in binary])
        images = {name: _image_values(table[name], f"{origin}: column {name!r}") for name in binary}
        try:
            rows = _plain_times(texts).to_pylist() if texts.num_columns else [{}] * table.num_rows
        except UnicodeDecodeError as error:
            raise DataError(
                f"{origin} holds text that is not UTF-8 ({said(error)}); write the table again with that text decoded, "
                "or exclude the file"
            ) from error
        for row in rows:
            yield {
                **{name: as_text(value) for name, value in row.items()},
                **{name: next(values) for name, values in images.items()},
            }


def _columns(schema: pa.Schema, origin: str, binary: Collection[str]) -> list[str]:
    """Names of the columns that records have; raises DataError for a name that stands twice, or is not there."""
    if twice := repeated(schema.names):
        raise DataError(f"{origin} has the column {twice[0]!r} twice; write the table again with names that differ")
    if lacking := sorted(set(binary) - set(schema.names)):
        raise DataError(
            f"{origin} has no column {lacking[0]!r}, which a template names as an image; columns there: "
            f"{', '.join(schema.names)}"
        )
    return [field.name for field in schema if field.name in binary or not is_binary(field.type)]


def _image_values(column: pa.ChunkedArray, origin: str) -> Iterator[bytes]:
    for chunk in column.chunks:
        if not (_is_bytes(chunk.type) or (pa.types.is_struct(chunk.type) and _has_bytes(chunk.type))):
            raise DataError(
                f"{origin} holds {chunk.type}, no image: that is binary, or a struct of `bytes` (binary) and `path`; "
                "name another column in the template"
            )
        for value in chunk:
            yield _image_bytes(value.as_py(), origin)


def _image_bytes(value: bytes | dict[str, Any] | None, origin: str) -> bytes:
    if isinstance(value, dict):
        content, path = value["bytes"], value.get("path")
        if content is None and path:
            try:
                with fsspec.open(path, "rb") as file:
                    return file.read()
            except (OSError, ValueError) as error:
                raise DataError(f"{origin}: image {path} cannot be read ({said(error)}); put it there") from error
        return content or b""
    return value or b""


def _plain_times(table: pa.Table) -> pa.Table:
    """Times of nanoseconds as times of microseconds, cut off: Python's own types know no smaller unit."""
    for number, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            plain = pa.timestamp("us", kind.tz)
        elif pa.types.is_duration(kind) and kind.unit == "ns":
            plain = pa.duration("us")
        elif pa.types.is_time64(kind) and kind.unit == "ns":
            plain = pa.time64("us")
        else:
            continue
        table = table.set_column(number, field.name, table[field.name].cast(plain, safe=False))
    return table


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes, or hold bytes somewhere inside (an image is a struct of bytes and a path)."""
    if isinstance(kind, pa.UuidType):
        return False
    if isinstance(kind, pa.BaseExtensionType):
        return is_binary(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_binary(kind.value_type)
    return _is_bytes(kind) or any(is_binary(kind.field(number).type) for number in range(kind.num_fields))


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _has_bytes(kind: pa.StructType) -> bool:
    at = kind.get_field_index("bytes")
    return at >= 0 and _is_bytes(kind.field(at).type)


@contextmanager
def _whole(origin: str, what: str) -> Iterator[None]:
    """Errors of the Arrow library about content as DataError; those of the file system, which have a number, pass."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(f"{origin} is no whole {what} ({said(error)}); replace or exclude it") from error
