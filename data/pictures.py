"""The pictures of a configuration's corpora, for training what turns them into codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cluster.storage import Storage
from configs.schema import RunConfig
from data.held_out import is_held_out_record
from data.inputs import list_inputs
from data.prepare import extract_tasks
from data.sources import read_records


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
