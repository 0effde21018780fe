"""Training the tokenizer of a mixture on a sample of its texts, in one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from cluster.storage import Storage
from configs.schema import TokenizerSection
from data.encode import TOKENIZER
from data.extract import Chunk, open_chunk
from data.tokenizer import Tokenizer

# Records that are taken out of a chunk at one time.
SAMPLED_RECORDS = 256


@dataclass(frozen=True)
class TrainingTask:
    """What the tokenizer is trained on: of each chunk so many characters."""

    storage_url: str
    folder: str
    samples: tuple[tuple[Chunk, int], ...]
    tokenizer: TokenizerSection
    # Corpora whose targets are image codes, which are no text.
    pictures: tuple[str, ...] = ()


def train_tokenizer(task: TrainingTask) -> None:
    """Train on the samples and write tokenizer.json; kept when there. Raises DataError, see `Tokenizer.train`."""
    storage = Storage(task.storage_url).child(task.folder)
    if storage.exists(TOKENIZER):
        return
    texts = [
        text
        for chunk, characters in task.samples
        for text in sampled(storage, chunk, characters, chunk.corpus not in task.pictures)
    ]
    section = task.tokenizer
    tokenizer = Tokenizer.train(texts, section.vocabulary_size, section.kind, section.prefixes, section.image_codes)
    storage.write_bytes(TOKENIZER, tokenizer.to_bytes())


def sampled(storage: Storage, chunk: Chunk, characters: int, targets: bool = True) -> Iterator[str]:
    """Sources (and `targets`) of records of a chunk in an order that its path decides, until there are `characters`."""
    table = open_chunk(storage, chunk)
    seed = xxhash.xxh3_64_intdigest(chunk.path.encode())
    order = np.random.Generator(np.random.PCG64(seed)).permutation(table.num_rows)
    for start in range(0, len(order), SAMPLED_RECORDS):
        some = table.take(order[start : start + SAMPLED_RECORDS])
        for source, target in zip(some["source"].to_pylist(), some["target"].to_pylist(), strict=True):
            if characters <= 0:
                return
            yield source
            if targets:
                yield target
            characters -= len(source) + len(target)
