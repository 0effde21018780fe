"""First half of preparation: files -> rendered (source, target) texts, in chunks that later tasks tokenize.

Corpora that read the same files are extracted together, so that each file is read and parsed once.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Storage
from configs.errors import DataError
from configs.schema import CorpusSection
from data.files import SourceFile
from data.held_out import HeldOutWriter, is_held_out_record, record_row
from data.manifest import ShardInfo
from data.sources import known_fields, read_records
from data.templates import PairTemplate, image_field, where

# Characters of a chunk, and of a record batch in it, which is what is held in memory; neither may follow the
# configured memory, for shards are made of chunks and their bytes must not depend on it.
CHUNK_CHARACTERS = 16 * 2**20
FLUSH_CHARACTERS = 2**20
TEXTS = pa.schema([pa.field("source", pa.large_string(), False), pa.field("target", pa.large_string(), False)])


class EncodeImage(Protocol):
    """Makes codes of a picture's file; `digest` stands for the codebook that they are of."""

    digest: str

    def __call__(self, picture: bytes) -> Sequence[int] | None:
        """Codes row by row; None for bytes that are no picture."""


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
    # Makes codes of a picture's bytes, None of what is no picture; needed where corpora have pictures.
    encode_image: EncodeImage | None = None


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
    counts = {corpus.name: Counter() for corpus in task.corpora}
    shared: Counter[str] = Counter()
    reader = task.corpora[0]
    fields, key = known_fields(reader), reader.held_out_key
    pictures = sorted({corpus.image_column for corpus in task.corpora if corpus.image_column is not None})
    with ExitStack() as files:
        writers = {name: files.enter_context(_ChunkWriter(storage, name, task.part)) for name in templates}
        held_out = {
            name: files.enter_context(HeldOutWriter(storage, f"work/held-{name}-{task.part:05d}.parquet"))
            for name in templates
        }
        for file in task.files:
            shared["files"] += 1
            for number, record in enumerate(read_records(reader, file, shared, pictures), 1):
                origin = f"{file.url} (record {number})"
                if key is not None and key not in record:
                    raise _lacks_key(reader, record, origin)
                keep = file.held_out or is_held_out_record(record, task.record_fraction, key)
                if pictures:
                    _encode_pictures(record, pictures, task.encode_image)
                for name, template in templates.items():
                    if fields is None:
                        template.check(record.keys(), origin)
                    pair = template.render(record)
                    if pair is None:
                        counts[name]["records with an empty source or target"] += 1
                    elif (refusal := template.refusal(*pair)) is not None:
                        counts[name][refusal] += 1
                    elif keep:
                        held_out[name].add(record_row(*pair, record))
                    else:
                        writers[name].add(*pair)
        for name, count in counts.items():
            count.update(shared)
            count["records held out"] = held_out[name].rows
        result = Extracted(
            [chunk for writer in writers.values() for chunk in writer.close()],
            {name: writer.close() for name, writer in held_out.items()},
            {name: dict(count) for name, count in counts.items()},
        )
    storage.write_text(receipt, result.to_json())
    return result


def _encode_pictures(record: dict[str, Any], columns: Sequence[str], encode_image: EncodeImage | None) -> None:
    """Replace pictures by their codes as text; one that cannot be decoded leaves an empty target."""
    assert encode_image is not None, "pictures need a codebook"
    for column in columns:
        picture = record.pop(column, None)
        if picture is not None:
            codes = encode_image(picture) if picture else None
            record[image_field(column)] = "" if codes is None else " ".join(map(str, codes))


class _ChunkWriter:
    """Writes chunks record batch by record batch; a context: a chunk that is not ended leaves nothing behind."""

    def __init__(self, storage: Storage, corpus: str, part: int) -> None:
        self._storage, self._corpus, self._part = storage, corpus, part
        self._chunks: list[Chunk] = []
        self._file = ExitStack()
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._sources: list[str] = []
        self._targets: list[str] = []
        # Characters of the pending batch, and records and characters of the chunk so far.
        self._pending = self._records = self._characters = 0

    def add(self, source: str, target: str) -> None:
        """Append a record."""
        self._sources.append(source)
        self._targets.append(target)
        self._pending += len(source) + len(target)
        if self._pending >= FLUSH_CHARACTERS:
            self._flush()
            if self._characters >= CHUNK_CHARACTERS:
                self._end_chunk()

    def close(self) -> list[Chunk]:
        """Write what is left; all chunks."""
        if self._sources:
            self._flush()
        if self._writer is not None:
            self._end_chunk()
        return self._chunks

    def __enter__(self) -> _ChunkWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()
        self._file.__exit__(*error)

    def _path(self) -> str:
        return f"work/texts-{self._corpus}-{self._part:05d}-{len(self._chunks):03d}.arrow"

    def _flush(self) -> None:
        if self._writer is None:
            file = self._file.enter_context(self._storage.open(self._path(), "wb"))
            self._writer = pa.ipc.new_file(pa.PythonFile(file, mode="w"), TEXTS)
        self._writer.write_batch(pa.record_batch([self._sources, self._targets], schema=TEXTS))
        self._records += len(self._sources)
        self._characters += self._pending
        self._sources, self._targets, self._pending = [], [], 0

    def _end_chunk(self) -> None:
        self._writer.close()
        self._file.close()
        self._chunks.append(Chunk(self._corpus, self._path(), self._records, self._characters))
        self._writer, self._records, self._characters = None, 0, 0


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


def batches(table: pa.Table, records: int, most_bytes: int) -> Iterator[tuple[list[str], list[str]]]:
    """Sources and targets of a chunk's table, at most so many records and bytes at a time; a larger record alone."""
    sizes = pc.add(pc.binary_length(table["source"]), pc.binary_length(table["target"])).to_numpy().tolist()
    start = held = 0
    for number, size in enumerate([*sizes, most_bytes + 1]):
        if number > start and (number - start == records or held + size > most_bytes):
            part = table.slice(start, number - start)
            yield part["source"].to_pylist(), part["target"].to_pylist()
            start, held = number, 0
        held += size


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
