"""Records of a corpus's files, one at a time whatever the size of the file.

Every error names the configuration field, the file and the fix.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import IO

import fsspec

from configs.errors import DataError
from configs.schema import CorpusSection
from data import hf_source
from data.files import SourceFile
from data.json_source import document, objects
from data.python_source import FIELDS as PYTHON_FIELDS
from data.python_source import decode_source, python_records
from data.tables import arrow_tables, delimited, parquet_tables, table_records
from data.templates import where

PARAGRAPH_GROUP_CHARACTERS = 2000

Record = dict[str, str]


def known_fields(corpus: CorpusSection) -> tuple[str, ...] | None:
    """Fields of every record of a corpus as far as its configuration tells; None where the files decide."""
    if corpus.kind in ("python", "text"):
        return PYTHON_FIELDS if corpus.kind == "python" else ("text", "path")
    return corpus.columns or None


def has_content(corpus: CorpusSection, file: SourceFile) -> bool:
    """Whether a file, read to its end, holds more than white space; raises DataError for what cannot be read."""
    if corpus.kind == "python":
        with _opened(corpus, file.urls[0]) as stream:
            return bool(decode_source(stream.read(), f"{where(corpus, 'path')}: {file.url}").strip())
    found = False
    for record in read_records(corpus, file, Counter()):
        found = found or any(value.strip() for value in record.values())
    return found


def read_records(corpus: CorpusSection, file: SourceFile, counts: Counter[str]) -> Iterator[Record]:
    """Records of one file; what is left out is counted in `counts` by reason. Raises DataError naming the file."""
    origin = f"{where(corpus, 'path')}: {file.url}"
    if corpus.kind == "hf":
        yield from table_records(hf_source.tables(corpus, file.urls[0], file.relative))
        return
    if corpus.kind == "parallel":
        yield from _aligned(corpus, file)
        return
    with _opened(corpus, file.urls[0]) as stream:
        if corpus.kind == "python":
            yield from python_records(stream.read(), file.relative, counts, origin)
        elif corpus.kind == "text":
            yield from _paragraph_groups(corpus, file, stream)
        elif corpus.kind == "parquet":
            yield from table_records(parquet_tables(stream, origin))
        elif corpus.kind == "arrow":
            yield from table_records(arrow_tables(stream, origin))
        elif corpus.kind == "json":
            yield from document(_lines(corpus, file.url, stream), corpus.records, origin)
        elif corpus.kind == "jsonl":
            yield from objects(_lines(corpus, file.url, stream), corpus.records, origin)
        else:
            separator = "," if corpus.kind == "csv" else "\t"
            yield from delimited(_lines(corpus, file.url, stream), separator, corpus.quotes, corpus.columns, origin)


@contextmanager
def _opened(corpus: CorpusSection, url: str) -> Iterator[IO[bytes]]:
    try:
        with fsspec.open(url, "rb") as raw:
            yield gzip.GzipFile(fileobj=raw) if url.endswith(".gz") else raw
    except FileNotFoundError as error:
        raise DataError(f"{where(corpus, 'path')}: {url} disappeared while it was read") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{where(corpus, 'path')}: {url} is no complete gzip file ({error}); replace or exclude it"
        ) from error


def _lines(corpus: CorpusSection, url: str, stream: IO[bytes]) -> Iterator[str]:
    offset = 0
    for line in stream:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where(corpus, 'path')}: {url} is not UTF-8 (byte {offset + error.start}); convert the file "
                f"(iconv -t UTF-8) or exclude it with {where(corpus, 'exclude')}"
            ) from error
        yield (text.removeprefix("\ufeff") if offset == 0 else text).replace("\r\n", "\n")
        offset += len(line)


def _paragraph_groups(corpus: CorpusSection, file: SourceFile, stream: IO[bytes]) -> Iterator[Record]:
    """Whole paragraphs (blank lines end them) gathered until a record has about 2,000 characters."""
    group: list[str] = []
    size = 0
    for line in _lines(corpus, file.url, stream):
        group.append(line)
        size += len(line)
        if size >= PARAGRAPH_GROUP_CHARACTERS and not line.strip():
            yield {"text": "".join(group).strip("\n"), "path": file.relative}
            group, size = [], 0
    if "".join(group).strip():
        yield {"text": "".join(group).strip("\n"), "path": file.relative}


def _aligned(corpus: CorpusSection, file: SourceFile) -> Iterator[Record]:
    """One record per line of files whose lines correspond, line ends left out."""
    urls = file.urls
    counted = [0] * len(urls)

    def column(number: int) -> Iterator[str]:
        with _opened(corpus, urls[number]) as stream:
            for line in _lines(corpus, urls[number], stream):
                counted[number] += 1
                yield line.rstrip("\n")

    missing = False
    for row in zip_longest(*(column(number) for number in range(len(urls)))):
        missing = missing or None in row
        # Past the end of the shortest file lines are read for their number alone, which the message tells.
        if not missing:
            yield dict(zip(corpus.columns, row, strict=True))
    if missing:
        found = " and ".join(f"{url} has {lines} lines" for url, lines in zip(urls, counted, strict=True))
        raise DataError(
            f"{where(corpus, 'path')}: {found}; line n of each must belong together: bring the files to the same lines"
        )
