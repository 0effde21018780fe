"""The pictures of a configuration's corpora, for training what turns them into codes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

from cluster.storage import Storage
from configs.schema import RunConfig
from data.held_out import is_held_out_record
from data.inputs import list_inputs
from data.prepare import extract_tasks
from data.sources import read_records

Item = TypeVar("Item")


def pictures(config: RunConfig, storage: Storage) -> Iterator[tuple[bytes, bool]]:
    """Bytes of each picture of the corpora with a target {image:COLUMN}, and whether its record is held out.

    Files in order, each picture as often as groups of corpora read it. Raises DataError for files without the column.
    """
    for task in extract_tasks(config, storage, "", list_inputs(config)):
        columns = sorted({corpus.image_column for corpus in task.corpora if corpus.image_column is not None})
        if not columns:
            continue
        reader = task.corpora[0]
        for file in task.files:
            for record in read_records(reader, file, Counter(), columns):
                held_out = file.held_out or is_held_out_record(record, task.record_fraction, reader.held_out_key)
                yield from ((record[column], held_out) for column in columns if record[column])


class LowestKeys(Generic[Item]):
    """Of items with keys those of the `most` lowest keys, each key once: a sample that no order of arrival changes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: dict[int, Item] = {}
        # Keys negated, so that the highest is the first.
        self._heap: list[int] = []

    def wants(self, key: int) -> bool:
        """Whether an item of this key would be kept."""
        return key not in self._items and (len(self._heap) < self._most or key < -self._heap[0])

    def add(self, key: int, item: Item) -> None:
        """Keep an item that is wanted; where there are too many, the one of the highest key goes."""
        self._items[key] = item
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, -key)
        else:
            del self._items[-heapq.heapreplace(self._heap, -key)]

    def items(self) -> list[tuple[int, Item]]:
        """Keys and items by ascending key."""
        return sorted(self._items.items(), key=lambda entry: entry[0])
