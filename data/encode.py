"""Second half of preparation: texts -> tokens -> rows -> shards, in a stream."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import xxhash

from cluster.storage import Storage
from data.extract import Chunk, batches, open_chunk
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
    # What of the source template is one token, see `Tokenizer.encode_batch`.
    prefix: str | None
    shard_rows: int
    block_rows: int
    # Targets are image codes as text.
    pictures: bool = False


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
    texts = _tokenized(storage, task.chunk, tokenizer, task.prefix, task.pictures)
    rows = rows_of(texts, task.form, tokenizer.eos_id, _seed(task.chunk.path), counts)
    shards: list[ShardInfo] = []
    for some in _groups(rows, task.shard_rows):
        path = f"shards/{task.chunk.corpus}/{task.number:05d}-{len(shards):03d}.arrow"
        shards.append(write_shard(storage, path, some, tokenizer.vocabulary_size, task.block_rows))
        counts["pairs"] += sum(map(len, some))
    result = Encoded(tuple(shards), counts["pairs"], counts["cut"], counts["shortened"])
    storage.write_text(receipt, json.dumps(asdict(result)))
    return result


def _tokenized(
    storage: Storage, chunk: Chunk, tokenizer: Tokenizer, prefix: str | None, pictures: bool
) -> Iterator[Pair]:
    """Source and target tokens of each record of a chunk, tokenized a batch at a time."""
    encode_targets = tokenizer.encode_codes if pictures else tokenizer.encode_batch
    for sources, targets in batches(open_chunk(storage, chunk), ENCODE_RECORDS, ENCODE_BYTES):
        yield from zip(tokenizer.encode_batch(sources, prefix), encode_targets(targets), strict=True)


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
