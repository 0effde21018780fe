"""First half of preparation: files -> rendered (source, target) texts, in chunks that later tasks tokenize.

Corpora that read the same files are extracted together, so that each file is read and parsed once.
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from configs.errors import DataError
from configs.schema import CorpusSection
from data.files import SourceFile
from data.held_out import is_held_out_record, record_row, write_records
from data.manifest import ShardInfo
from data.sources import known_fields, read_records
from data.templates import PairTemplate, where

CHUNK_CHARACTERS = 64 * 2**20
TEXTS = pa.schema([pa.field("source", pa.large_string(), False), pa.field("target", pa.large_string(), False)])


@dataclass(frozen=True)
class ExtractTask:
    """Some files of one or more corpora that share their records; files say whether they are held out whole."""

    storage_url: str
    folder: str
    part: int
    corpora: tuple[CorpusSection, ...]
    files: tuple[SourceFile, ...]
    # Share of records held out by their own hash or that of `held_out_key`; 0 where files decide.
    record_fraction: float
    # None in layout sequence, see `PairTemplate`.
    source_tokens: int | None


@dataclass(frozen=True)
class Chunk:
    """One file of rendered training texts of one corpus; `drops` are files of row numbers that are to be left out."""

    corpus: str
    path: str
    records: int
    characters: int
    drops: tuple[str, ...] = ()


@dataclass
class Extracted:
    """What a task left in storage, by corpus name where the corpora differ."""

    chunks: list[Chunk]
    held_out: dict[str, ShardInfo]
    counts: dict[str, dict[str, int]]

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Extracted:
        """Inverse of `to_json`."""
        body = json.loads(text)
        held_out = {name: ShardInfo(**info) for name, info in body["held_out"].items()}
        return cls([Chunk(**{**chunk, "drops": ()}) for chunk in body["chunks"]], held_out, body["counts"])


def extract(task: ExtractTask) -> Extracted:
    """Read the task's files and write chunks and held-out records below `folder`/work; done work is kept.

    Raises DataError for input that cannot be used.
    """
    storage = Storage(task.storage_url).child(task.folder)
    receipt = f"work/extract-{task.part:05d}.json"
    if storage.exists(receipt):
        return Extracted.from_json(storage.read_text(receipt))
    templates = {corpus.name: PairTemplate(corpus, task.source_tokens) for corpus in task.corpora}
    writers = {corpus.name: _ChunkWriter(storage, corpus.name, task.part) for corpus in task.corpora}
    held_out: dict[str, list[dict[str, str]]] = defaultdict(list)
    counts = {corpus.name: Counter() for corpus in task.corpora}
    shared: Counter[str] = Counter()
    reader = task.corpora[0]
    fields, key = known_fields(reader), reader.held_out_key
    for file in task.files:
        shared["files"] += 1
        for number, record in enumerate(read_records(reader, file, shared), 1):
            if key is not None and key not in record:
                raise _lacks_key(reader, record, f"{file.url} (record {number})")
            keep = file.held_out or is_held_out_record(record, task.record_fraction, key)
            for name, template in templates.items():
                if fields is None:
                    template.check(record.keys(), f"{file.url} (record {number})")
                pair = template.render(record)
                if pair is None:
                    counts[name]["records with an empty source or target"] += 1
                elif (refusal := template.refusal(*pair)) is not None:
                    counts[name][refusal] += 1
                elif keep:
                    held_out[name].append(record_row(*pair, record))
                else:
                    writers[name].add(*pair)
    for name, count in counts.items():
        count.update(shared)
        count["records held out"] = len(held_out[name])
    result = Extracted(
        [chunk for writer in writers.values() for chunk in writer.close()],
        {name: write_records(storage, f"work/held-{name}-{task.part:05d}.parquet", held_out[name]) for name in counts},
        {name: dict(count) for name, count in counts.items()},
    )
    storage.write_text(receipt, result.to_json())
    return result


class _ChunkWriter:
    def __init__(self, storage: Storage, corpus: str, part: int) -> None:
        self._storage, self._corpus, self._part = storage, corpus, part
        self._chunks: list[Chunk] = []
        self._sources: list[str] = []
        self._targets: list[str] = []
        self._characters = 0

    def add(self, source: str, target: str) -> None:
        self._sources.append(source)
        self._targets.append(target)
        self._characters += len(source) + len(target)
        if self._characters >= CHUNK_CHARACTERS:
            self._flush()

    def close(self) -> list[Chunk]:
        if self._sources:
            self._flush()
        return self._chunks

    def _flush(self) -> None:
        path = f"work/texts-{self._corpus}-{self._part:05d}-{len(self._chunks):03d}.arrow"
        table = pa.table({"source": self._sources, "target": self._targets}, schema=TEXTS)
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, TEXTS) as writer:
            writer.write_table(table)
        self._storage.write_bytes(path, buffer.getvalue())
        self._chunks.append(Chunk(self._corpus, path, len(self._sources), self._characters))
        self._sources, self._targets, self._characters = [], [], 0


def open_chunk(storage: Storage, chunk: Chunk) -> pa.Table:
    """Columns source and target of a chunk without what is dropped; `storage` is the data folder's.

    A chunk on a local disk is memory-mapped, so that slices of the table can be read one after the other.
    """
    path = storage.local_path(chunk.path)
    file = pa.memory_map(path) if path is not None else io.BytesIO(storage.read_bytes(chunk.path))
    table = pa.ipc.open_file(file).read_all()
    if chunk.drops:
        keep = np.ones(table.num_rows, dtype=bool)
        for path in chunk.drops:
            keep[np.frombuffer(storage.read_bytes(path), dtype=np.int64)] = False
        table = table.filter(pa.array(keep))
    return table


def read_chunk(storage: Storage, chunk: Chunk) -> tuple[list[str], list[str]]:
    """Sources and targets of `open_chunk`, all at once."""
    table = open_chunk(storage, chunk)
    return table["source"].to_pylist(), table["target"].to_pylist()


def check_known_fields(corpus: CorpusSection, source_tokens: int | None) -> None:
    """Raise DataError when a template is wrong for every record that the corpus's kind can give."""
    template = PairTemplate(corpus, source_tokens)
    fields = known_fields(corpus)
    if fields is not None:
        template.check(fields, f"kind {corpus.kind!r}")
        if corpus.held_out_key is not None and corpus.held_out_key not in fields:
            raise _lacks_key(corpus, fields, f"kind {corpus.kind!r}")


def _lacks_key(corpus: CorpusSection, fields: Iterable[str], origin: str) -> DataError:
    return DataError(
        f"{where(corpus, 'held_out_key')}: records of {origin} have no field {corpus.held_out_key!r}; fields there: "
        f"{', '.join(sorted(fields))}"
    )


def check_not_empty(corpus: CorpusSection, counts: Counter[str], training_records: int) -> None:
    """Raise DataError when a corpus gave no record to train on."""
    if training_records:
        return
    if counts["records held out"]:
        raise DataError(
            f"{where(corpus, 'path')}: all {counts['records held out']} usable records of {corpus.path} are held out "
            "or equal to one that is; lower data.held_out_fraction or add files"
        )
    reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(counts.items()) if number)
    raise DataError(
        f"{where(corpus, 'path')}: {corpus.path} gives no record of kind {corpus.kind!r} ({reasons}); change path or "
        "kind, or put content there"
    )
