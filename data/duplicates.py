"""Exact duplicates of a corpus: of records with equal source and target the first stays, none that is held out too.

Which record is the first depends on the order of files and of records in them, so the number of tasks has no say.
Hashes are divided among partitions by value, so many that one fits into a task's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from cluster.storage import Storage
from data.extract import Chunk, batches, open_chunk
from data.runners import Runner

# Hash, row number, sort order and copies of them, for each record of a partition.
BYTES_PER_RECORD = 128
BATCH_RECORDS, BATCH_BYTES = 4096, 1 << 22
# 128 bits: among 10^12 records two different ones share a hash with probability below 10^-14.
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True)
class PartitionTask:
    """Hashes of all chunks of one corpus, of which this task takes those with `high % partitions == partition`."""

    storage_url: str
    folder: str
    corpus: str
    chunks: tuple[Chunk, ...]
    partition: int
    partitions: int


def drop_duplicates(
    storage_url: str,
    folder: str,
    corpus: str,
    held_out: Iterable[bytes],
    chunks: Sequence[Chunk],
    run_tasks: Runner,
    memory_bytes: int,
) -> tuple[list[Chunk], dict[str, int]]:
    """Chunks that leave duplicates out (their `records` without them), and counts.

    `held_out` are the `digest`s of held-out rows, each once; a task takes about `memory_bytes`.
    """
    inside = Storage(storage_url).child(folder)
    inside.write_bytes(_held_path(corpus), b"".join(held_out))
    run_tasks(write_hashes, [(storage_url, folder, chunk) for chunk in chunks])
    partitions = max(1, -(-sum(chunk.records for chunk in chunks) * BYTES_PER_RECORD // memory_bytes))
    tasks = [
        (PartitionTask(storage_url, folder, corpus, tuple(chunks), number, partitions),) for number in range(partitions)
    ]
    found: list[list[tuple[int, int]]] = run_tasks(find_duplicates, tasks)
    kept = []
    for number, chunk in enumerate(chunks):
        dropped = sum(sum(partition[number]) for partition in found)
        drops = tuple(_drop_path(chunk, part, partitions) for part in range(partitions)) if dropped else ()
        kept.append(replace(chunk, records=chunk.records - dropped, drops=drops))
    counts = {
        "duplicate records": sum(repeated for partition in found for repeated, _ in partition),
        "records equal to one held out": sum(leaked for partition in found for _, leaked in partition),
    }
    return [chunk for chunk in kept if chunk.records], counts


def write_hashes(storage_url: str, folder: str, chunk: Chunk) -> None:
    """Write the hash of each record of a chunk, in order; kept when there."""
    inside = Storage(storage_url).child(folder)
    if inside.exists(_hash_path(chunk)):
        return
    found = [
        digest(*pair)
        for sources, targets in batches(open_chunk(inside, chunk), BATCH_RECORDS, BATCH_BYTES)
        for pair in zip(sources, targets, strict=True)
    ]
    inside.write_bytes(_hash_path(chunk), b"".join(found))


def find_duplicates(task: PartitionTask) -> list[tuple[int, int]]:
    """Write the row numbers to drop of each chunk; (repeated, equal to a held-out one) of each. Done work is kept."""
    inside = Storage(task.storage_url).child(task.folder)
    receipt = f"work/duplicates-{task.corpus}-{task.partition:05d}-of-{task.partitions:05d}.json"
    if inside.exists(receipt):
        return [tuple(pair) for pair in json.loads(inside.read_text(receipt))]
    parts = [_partition(_hashes(inside, _held_path(task.corpus)), task)[0]]
    rows = [np.full(len(parts[0]), -1)]
    for chunk in task.chunks:
        mine, numbers = _partition(_hashes(inside, _hash_path(chunk)), task)
        parts.append(mine)
        rows.append(numbers)
    ends = np.cumsum([len(part) for part in parts])
    every = np.concatenate(parts)
    # The first of each group of equal hashes, held-out ones before all others: the sort is stable.
    order = np.lexsort((every["low"], every["high"]))
    starts = np.ones(len(every), dtype=bool)
    starts[1:] = every[order][1:] != every[order][:-1]
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(every)), 0))]
    first_of = np.empty(len(every), dtype=np.int64)
    first_of[order] = first
    result = []
    for number, chunk in enumerate(task.chunks, 1):
        span = np.arange(ends[number - 1], ends[number])
        again = first_of[span] != span
        leaked = first_of[span] < ends[0]
        inside.write_bytes(
            _drop_path(chunk, task.partition, task.partitions), rows[number][again].astype("<i8").tobytes()
        )
        result.append((int((again & ~leaked).sum()), int(leaked.sum())))
    inside.write_text(receipt, json.dumps(result))
    return result


def _partition(hashes: np.ndarray, task: PartitionTask) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of this partition and their row numbers."""
    numbers = np.flatnonzero(hashes["high"] % np.uint64(task.partitions) == task.partition)
    return hashes[numbers], numbers


def _hashes(inside: Storage, path: str) -> np.ndarray:
    return np.frombuffer(inside.read_bytes(path), dtype=HASH)


def digest(source: str, target: str) -> bytes:
    """Hash of a pair of texts, 16 bytes."""
    text = f"{len(source)} {source}{target}"
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _held_path(corpus: str) -> str:
    return f"work/hashes-held-{corpus}.bin"


def _hash_path(chunk: Chunk) -> str:
    return chunk.path.replace("work/texts-", "work/hashes-").replace(".arrow", ".bin")


def _drop_path(chunk: Chunk, partition: int, partitions: int) -> str:
    own = f"-{partition:05d}-of-{partitions:05d}.bin"
    return chunk.path.replace("work/texts-", "work/drop-").replace(".arrow", own)
