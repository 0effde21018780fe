"""Slices of a cell: the unit that evaluators work on, keyed by everything its answers depend on, kept as Parquet."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage
from configs.errors import StorageError
from configs.schema import EvaluateSection
from jobs.energy import Energy
from jobs.tasks.base import Attempts, Choices, Draw, Example, Explain, Generate, Request, Row

FOLDER = "evaluation/slices"
GREEDY = "greedy"
# Key of a file's metadata.
ENERGY = b"telar.energy"
SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("answers", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Slice:
    """Some examples of one cell (task and corpus), answered together as one batch in this order."""

    corpus: str
    task: str
    key: str
    examples: tuple[Example, ...]
    max_new_tokens: int

    @property
    def path(self) -> str:
        """Where the answers lie, relative to the run's folder."""
        return f"{FOLDER}/{self.key}.parquet"

    @property
    def cost(self) -> int:
        """A rough measure of the work: characters to read, and many times as much for each token to write."""
        return sum(_cost(request, self.max_new_tokens) for example in self.examples for request in example.requests)


def _cost(request: Request, max_new_tokens: int) -> int:
    if isinstance(request, Attempts):
        return request.number * (len(request.source) + 16 * max_new_tokens)
    if isinstance(request, Generate | Draw):
        return len(request.source) + 16 * max_new_tokens
    if isinstance(request, Choices):
        return sum(len(request.source) + len(target) for target in request.targets)
    if isinstance(request, Explain):
        return 60 * sum(len(request.source) + len(target) for target in request.targets)
    return len(request.source) + len(request.target)


def decoding_of(evaluate: EvaluateSection) -> str:
    """How outputs are chosen, in words; part of each slice's key and of the results."""
    return GREEDY if evaluate.beams == 1 else f"beam search, {evaluate.beams} beams, alpha {evaluate.length_penalty:g}"


def cut(
    corpus: str,
    task: str,
    version: int,
    examples: Sequence[Example],
    size: int,
    max_new_tokens: int,
    inputs: dict[str, str],
    decoding: str = GREEDY,
) -> list[Slice]:
    """A cell's examples in slices of `size`, in order.

    `inputs` names what else the answers depend on (digests of checkpoints and data), `decoding` how outputs are chosen
    (see `decoding_of`). The number of evaluators is no part of the key, so that fewer or more of them find the same
    slices.
    """
    slices = []
    for start in range(0, len(examples), size):
        part = tuple(examples[start : start + size])
        content = {
            **inputs,
            "corpus": corpus,
            "task": task,
            "version": version,
            "generation": {"kind": decoding, "max_new_tokens": max_new_tokens},
            "rows": [example.record.index for example in part],
            "requests": [
                [[type(request).__name__, asdict(request)] for request in example.requests] for example in part
            ],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        slices.append(Slice(corpus, task, f"{task}-{corpus}-{digest[:32]}", part, max_new_tokens))
    return slices


def write_rows(folder: Storage, piece: Slice, rows: Sequence[Row], energy: Energy | None = None) -> None:
    """Create the slice's Parquet; one that is there already stays as it is. `energy` is what answering took."""
    table = pa.table(
        {
            "index": [row.index for row in rows],
            "answers": [json.dumps(row.answers) for row in rows],
            "error": [row.error for row in rows],
        },
        schema=SCHEMA if energy is None else SCHEMA.with_metadata({ENERGY: json.dumps(asdict(energy))}),
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    folder.create(piece.path, buffer.getvalue())


def read_energy(folder: Storage, piece: Slice) -> Energy | None:
    """What answering a finished slice took, or None where nobody noted it; the rows are read by `read_rows`."""
    schema = pq.read_schema(io.BytesIO(folder.read_bytes(piece.path)))
    noted = (schema.metadata or {}).get(ENERGY)
    return Energy(**json.loads(noted)) if noted is not None else None


def read_rows(folder: Storage, piece: Slice) -> list[Row] | None:
    """The rows of a finished slice, or None when it is not finished.

    Raises StorageError when the file is damaged or holds other records.
    """
    try:
        data = folder.read_bytes(piece.path)
    except FileNotFoundError:
        return None
    try:
        table = pq.read_table(io.BytesIO(data), schema=SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, piece, str(error)) from error
    rows = [Row(entry["index"], tuple(json.loads(entry["answers"])), entry["error"]) for entry in table.to_pylist()]
    if [row.index for row in rows] != [example.record.index for example in piece.examples]:
        raise _damaged(folder, piece, "it holds other records")
    return rows


def is_answered(folder: Storage, piece: Slice) -> bool:
    """Whether all rows of a slice have answers; rows with an error are asked again, they may have been out of luck.

    Raises StorageError as `read_rows`.
    """
    rows = read_rows(folder, piece)
    return rows is not None and all(row.error is None for row in rows)


def _damaged(folder: Storage, piece: Slice, reason: str) -> StorageError:
    return StorageError(f"{folder.url}/{piece.path}: damaged ({reason}); remove the file and evaluate again")
