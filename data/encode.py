"""Second half of preparation: the tokenizer, and texts -> tokens -> rows -> shards in a stream."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import pyarrow.compute as pc
import xxhash

from cluster.storage import Storage
from data.extract import Chunk, open_chunk, read_chunk
from data.manifest import ShardInfo
from data.packing import Pair, Row
from data.rows import RowFormat, rows_of
from data.shards import write_shard
from data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
# Texts that are tokenized at one time: so many records, of so many bytes unless one has more.
ENCODE_RECORDS = 4096
ENCODE_BYTES = 1 << 22


@dataclass(frozen=True)
class EncodeTask:
    """One chunk of one corpus and all that decides how its shards look."""

    storage_url: str
    folder: str
    chunk: Chunk
    number: int
    form: RowFormat
    shard_rows: int
    block_rows: int


@dataclass(frozen=True)
class Encoded:
    """Shards of one chunk, pairs in them, targets cut in pieces, and tokens that shortened sources lost."""

    shards: tuple[ShardInfo, ...]
    pairs: int
    cut_targets: int
    truncated_source_tokens: int

    @classmethod
    def from_json(cls, text: str) -> Encoded:
        """Inverse of `json.dumps(asdict(...))`."""
        body = json.loads(text)
        return cls(**{**body, "shards": tuple(ShardInfo(**shard) for shard in body["shards"])})


def train_tokenizer(storage_url: str, folder: str, samples: Sequence[tuple[Chunk, int]], vocabulary_size: int) -> None:
    """Train on `samples`, each a chunk and how many characters of it, and write tokenizer.json; kept when there."""
    storage = Storage(storage_url).child(folder)
    if storage.exists(TOKENIZER):
        return
    texts: list[str] = []
    for chunk, characters in samples:
        sources, targets = read_chunk(storage, chunk)
        order = np.random.Generator(np.random.PCG64(_seed(chunk.path))).permutation(len(sources))
        for i in order:
            if characters <= 0:
                break
            texts.extend((sources[i], targets[i]))
            characters -= len(sources[i]) + len(targets[i])
    storage.write_bytes(TOKENIZER, Tokenizer.train(texts, vocabulary_size).to_bytes())


def encode(task: EncodeTask) -> Encoded:
    """Tokenize, cut, pack and write the shards of one chunk; shards that are there and match their digest stay.

    Tokens in memory are at most those of one batch, one packing window and one shard.
    """
    storage = Storage(task.storage_url).child(task.folder)
    receipt = f"work/encode-{task.chunk.corpus}-{task.number:05d}.json"
    if storage.exists(receipt):
        done = Encoded.from_json(storage.read_text(receipt))
        if all(_is_whole(storage, shard) for shard in done.shards):
            return done
    tokenizer = Tokenizer.load(storage.read_bytes(TOKENIZER))
    counts: Counter[str] = Counter()
    texts = _tokenized(storage, task.chunk, tokenizer)
    rows = rows_of(texts, task.form, tokenizer.eos_id, _seed(task.chunk.path), counts)
    shards: list[ShardInfo] = []
    for some in _groups(rows, task.shard_rows):
        path = f"shards/{task.chunk.corpus}/{task.number:05d}-{len(shards):03d}.arrow"
        shards.append(write_shard(storage, path, some, tokenizer.vocabulary_size, task.block_rows))
        counts["pairs"] += sum(map(len, some))
    result = Encoded(tuple(shards), counts["pairs"], counts["cut"], counts["shortened"])
    storage.write_text(receipt, json.dumps(asdict(result)))
    return result


def _tokenized(storage: Storage, chunk: Chunk, tokenizer: Tokenizer) -> Iterator[Pair]:
    """Source and target tokens of each record of a chunk, tokenized a batch at a time."""
    table = open_chunk(storage, chunk)
    sizes = pc.add(pc.binary_length(table["source"]), pc.binary_length(table["target"])).to_numpy()
    for start, end in _ranges(sizes.tolist()):
        columns = (table[name].slice(start, end - start).to_pylist() for name in ("source", "target"))
        encoded = tokenizer.encode_batch([text for column in columns for text in column])
        yield from zip(encoded[: end - start], encoded[end - start :], strict=True)


def _ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) of records within ENCODE_RECORDS and ENCODE_BYTES; a larger record stands alone."""
    start = held = 0
    for number, size in enumerate(sizes):
        if number > start and (number - start == ENCODE_RECORDS or held + size > ENCODE_BYTES):
            yield start, number
            start, held = number, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


def _groups(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while group := list(islice(rows, size)):
        yield group


def _is_whole(storage: Storage, shard: ShardInfo) -> bool:
    try:
        return xxhash.xxh3_128_hexdigest(storage.read_bytes(shard.path)) == shard.digest
    except FileNotFoundError:
        return False


def _seed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
