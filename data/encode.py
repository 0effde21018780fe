"""Second half of preparation: training the tokenizer, and texts -> token pairs -> packed samples -> shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import xxhash

from cluster.storage import Storage
from data.extract import Chunk, read_chunk
from data.manifest import ShardInfo
from data.packing import Pair, cut_pairs, pack
from data.shards import write_shard
from data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
ENCODE_RECORDS = 4096


@dataclass(frozen=True)
class EncodeTask:
    """One chunk of one corpus and all that decides how its shards look."""

    storage_url: str
    folder: str
    chunk: Chunk
    number: int
    keep_head: bool
    source_tokens: int
    target_tokens: int
    shard_rows: int
    block_rows: int


@dataclass(frozen=True)
class Encoded:
    """Shards of one chunk, pairs in them, and how many sources were shortened by how many tokens."""

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
    """Tokenize, cut, pack and write the shards of one chunk; shards that are there and match their digest stay."""
    storage = Storage(task.storage_url).child(task.folder)
    receipt = f"work/encode-{task.chunk.corpus}-{task.number:05d}.json"
    if storage.exists(receipt):
        done = Encoded.from_json(storage.read_text(receipt))
        if all(_is_whole(storage, shard) for shard in done.shards):
            return done
    tokenizer = Tokenizer.load(storage.read_bytes(TOKENIZER))
    sources, targets = read_chunk(storage, task.chunk)
    pairs: list[Pair] = []
    cut_targets = truncated = 0
    for start in range(0, len(sources), ENCODE_RECORDS):
        encoded = tokenizer.encode_batch(
            [*sources[start : start + ENCODE_RECORDS], *targets[start : start + ENCODE_RECORDS]]
        )
        half = len(encoded) // 2
        for source, target in zip(encoded[:half], encoded[half:], strict=True):
            pieces = cut_pairs(source, target, tokenizer.eos_id, task.source_tokens, task.target_tokens, task.keep_head)
            pairs.extend(pieces)
            cut_targets += len(pieces) > 1
            truncated += max(0, len(source) - task.source_tokens)
    samples = pack(
        [len(source) for source, _ in pairs],
        [len(labels) for _, labels in pairs],
        task.source_tokens,
        task.target_tokens,
        _seed(task.chunk.path),
    )
    shards = []
    for start in range(0, len(samples), task.shard_rows):
        rows = [[pairs[i] for i in sample] for sample in samples[start : start + task.shard_rows]]
        path = f"shards/{task.chunk.corpus}/{task.number:05d}-{len(shards):03d}.arrow"
        shards.append(write_shard(storage, path, rows, tokenizer.vocabulary_size, task.block_rows))
    result = Encoded(tuple(shards), len(pairs), cut_targets, truncated)
    storage.write_text(receipt, json.dumps(asdict(result)))
    return result


def _is_whole(storage: Storage, shard: ShardInfo) -> bool:
    try:
        return xxhash.xxh3_128_hexdigest(storage.read_bytes(shard.path)) == shard.digest
    except FileNotFoundError:
        return False


def _seed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
