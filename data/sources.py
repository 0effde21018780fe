"""Records of a corpus's files, one at a time whatever the size of the file.

Every error names the configuration field, the file and the fix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import zip_longest
from typing import IO

from configs.errors import DataError
from configs.schema import CorpusSection
from data import hf_source
from data.babi import FIELDS as STORY_FIELDS
from data.babi import stories
from data.delimited import delimited
from data.drawn_shapes import shape_records, side_of
from data.files import SourceFile
from data.json_source import document, objects
from data.opening import lines, opened
from data.python_source import FIELDS as PYTHON_FIELDS
from data.python_source import decode_source, python_records
from data.tables import arrow_tables, parquet_tables, table_records
from data.templates import where

PARAGRAPH_GROUP_CHARACTERS = 2000
# Text without blank lines is cut all the same, at the end of a line or after a blank.
MOST_GROUP_CHARACTERS = 32 * 1024

# Fields of a record; those of image columns that were asked for are bytes.
Record = dict[str, str]


def known_fields(corpus: CorpusSection) -> tuple[str, ...] | None:
    """Fields of every record of a corpus as far as its configuration tells; None where the files decide."""
    if corpus.kind in ("python", "text"):
        return PYTHON_FIELDS if corpus.kind == "python" else ("text", "path")
    return STORY_FIELDS if corpus.kind == "babi" else corpus.columns or None


def has_content(corpus: CorpusSection, file: SourceFile) -> bool:
    """Whether a file, read to its end, holds more than white space; raises DataError for what cannot be read."""
    if corpus.kind == "python":
        with opened(corpus, file.urls[0]) as stream:
            return bool(decode_source(stream.read(), f"{where(corpus, 'path')}: {file.url}").strip())
    found = False
    for record in read_records(corpus, file, Counter()):
        found = found or any(value.strip() for value in record.values())
    return found


def read_records(
    corpus: CorpusSection, file: SourceFile, counts: Counter[str], binary: Collection[str] = ()
) -> Iterator[Record]:
    """Records of one file; what is left out is counted in `counts` by reason.

    `binary` names image columns of kinds parquet, arrow and hf to keep; their fields are bytes. Raises DataError naming
    the file for what is wrong with it, StorageError when it cannot be read for now.
    """
    origin = f"{where(corpus, 'path')}: {file.url}"
    if corpus.kind == "hf":
        yield from table_records(hf_source.tables(corpus, file.urls[0], file.relative), origin, binary)
        return
    if corpus.kind == "parallel":
        yield from _aligned(corpus, file)
        return
    if corpus.kind == "shapes":
        yield from shape_records(side_of(file.urls[0]), binary, origin)
        return
    url = file.urls[0]
    with opened(corpus, url, seekable=corpus.kind in ("parquet", "arrow")) as stream:
        if corpus.kind == "python":
            yield from python_records(stream.read(), file.relative, counts, origin)
        elif corpus.kind == "text":
            yield from _paragraph_groups(corpus, file, stream)
        elif corpus.kind == "parquet":
            yield from table_records(parquet_tables(stream, origin, binary), origin, binary)
        elif corpus.kind == "arrow":
            yield from table_records(arrow_tables(stream, origin, binary), origin, binary)
        elif corpus.kind == "json":
            yield from document(stream, corpus, file.url)
        elif corpus.kind == "babi":
            yield from stories(lines(corpus, url, stream), file.relative, origin)
        elif corpus.kind == "jsonl":
            yield from objects(lines(corpus, url, stream), corpus.records, origin)
        else:
            separator = "," if corpus.kind == "csv" else "\t"
            yield from delimited(lines(corpus, url, stream), separator, corpus.quotes, corpus.columns, origin)


def _paragraph_groups(corpus: CorpusSection, file: SourceFile, stream: IO[bytes]) -> Iterator[Record]:
    """Whole paragraphs (blank lines end them) gathered until a record has about 2,000 characters."""
    group: list[str] = []
    size = 0
    for line in lines(corpus, file.url, stream, cut_at=MOST_GROUP_CHARACTERS):
        if size + len(line) > MOST_GROUP_CHARACTERS:
            yield from _group_record(group, file)
            group, size = [], 0
        group.append(line)
        size += len(line)
        if size >= PARAGRAPH_GROUP_CHARACTERS and not line.strip():
            yield from _group_record(group, file)
            group, size = [], 0
    yield from _group_record(group, file)


def _group_record(group: list[str], file: SourceFile) -> Iterator[Record]:
    text = "".join(group).strip("\n")
    if text.strip():
        yield {"text": text, "path": file.relative}


def _aligned(corpus: CorpusSection, file: SourceFile) -> Iterator[Record]:
    """One record per line of files whose lines correspond, line ends left out."""
    urls = file.urls
    counted = [0] * len(urls)

    def column(number: int) -> Iterator[str]:
        with opened(corpus, urls[number]) as stream:
            for line in lines(corpus, urls[number], stream):
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
