"""The rows of a task as data: read through the corpora's sources, reshaped, and put into templates."""

from __future__ import annotations

import hashlib
import heapq
import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from configs.errors import DataError
from configs.schema import TaskSection
from data.files import list_files
from data.held_out import HeldOut, share_of
from data.json_source import as_text
from data.sources import read_records
from jobs.tasks.reshape import RESHAPES


def where(task: TaskSection, field: str) -> str:
    """How messages name a field of a task."""
    return f"task {task.name}: {field}"


def data_version(task: TaskSection) -> list[list[Any]]:
    """Files of a task with their sizes and versions, without reading them; raises DataError or StorageError."""
    return [[file.url, file.bytes, file.version] for file in list_files(task.corpus())]


def records_of(task: TaskSection) -> Iterator[dict[str, str]]:
    """All rows of a task's files in their order, reshaped; raises DataError or StorageError naming the file."""
    corpus = task.corpus()
    for file in list_files(corpus):
        for record in read_records(corpus, file, Counter()):
            # Which file a row is of may tell its group; a column of that name comes first.
            yield from RESHAPES[task.reshape]({"file": file.relative, **record}, where(task, "reshape"))


def read_rows_of(task: TaskSection, limit: int, seed: int) -> list[HeldOut]:
    """At most `limit` rows, chosen by a hash of (seed, number), in the order of the files, source and target rendered.

    The same arguments and files give the same rows, and a smaller limit gives a subset. Raises DataError when there is
    no row, or one lacks a field.
    """
    chosen = heapq.nsmallest(
        limit,
        enumerate(records_of(task)),
        key=lambda numbered: (share_of(f"{seed}/{numbered[0]}"), numbered[0]),
    )
    if not chosen:
        raise DataError(f"{where(task, 'path')}: {task.path} holds no row")
    return [
        HeldOut(
            number,
            rendered(task, "source", task.source, record, number),
            rendered(task, "target", task.target, record, number),
            record,
        )
        for number, record in sorted(chosen, key=lambda numbered: numbered[0])
    ]


def digest_of_rows(rows: list[HeldOut]) -> str:
    """Digest of the content of rows, all fields."""
    content = json.dumps([[row.index, row.source, row.target, row.fields] for row in rows], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def digest_of_definition(task: TaskSection) -> str:
    """Digest of all fields of a definition."""
    return hashlib.sha256(task.model_dump_json().encode()).hexdigest()[:32]


def rendered(task: TaskSection, field: str, template: str, record: Mapping[str, str], number: int) -> str:
    """The text of a template for one row; raises DataError naming field and row when the row lacks a field."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(_value(name, record, f"{where(task, field)}: row {number}"))
    return "".join(parts)


def _value(name: str, record: Mapping[str, str], origin: str) -> str:
    """The field `name`, or what a dotted name leads to inside a field of JSON."""
    if name in record:
        return record[name]
    first, *steps = name.split(".")
    if first not in record or not steps:
        raise DataError(f"{origin} has no field {name!r}; fields there: {', '.join(record) or 'none'}")
    try:
        value = json.loads(record[first])
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: {name!r} goes into field {first!r}, which is no JSON ({error.msg})") from error
    for depth, step in enumerate(steps, 1):
        inside = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
        key = int(step) if isinstance(value, list) and step.isdigit() else step
        if key not in inside:
            there = f"; there: {', '.join(map(str, inside))}" if inside else ""
            path = ".".join([first, *steps[: depth - 1]])
            raise DataError(f"{origin}: {name!r}: {path} has no {step!r}{there}")
        value = inside[key]
    return as_text(value)
