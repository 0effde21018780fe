"""Records of delimited text: CSV and TSV."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from configs.errors import DataError

MOST_FIELD_CHARACTERS = 64 * 2**20


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
    begun = 1
    try:
        for row in rows:
            place = f"{origin} line {begun}"
            begun = rows.line_num + 1
            if not row:
                continue
            if not names:
                names = row
                twice = repeated(names)
                if twice:
                    raise DataError(
                        f"{place} names the column {twice[0]!r} twice; rename one, or name all columns in `columns` "
                        "when the first line is no header"
                    )
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{place} has {len(row)} values, there are {len(names)} columns "
                    f"({', '.join(names)}); mend the line, set quotes: {str(not quotes).lower()}, or correct `columns`"
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        until = f" (read up to line {rows.line_num})" if rows.line_num > begun else ""
        raise DataError(
            f"{origin} line {begun}: {error}{until}; mend the line, or set quotes: false when quote characters are "
            "ordinary text there"
        ) from error


def repeated(names: Iterable[str]) -> list[str]:
    """Names that stand more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
