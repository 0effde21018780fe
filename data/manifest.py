"""The manifest of prepared data: what was made, with digests. Written once, last; immutable from then on.

`manifest.json` holds everything but the shards, which are rows of `shards.arrow` (data/shard_table.py); it grows by
some 110 bytes for every 256 shards. Opening reads it and maps the table, which is first fetched if remote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash

from cluster.storage import Storage
from configs.errors import DataError
from data.shard_table import RecordBatch, ShardInfo, ShardTable, TableBlock, TableShards, write_table

__all__ = ["NAME", "TABLE", "CorpusInfo", "Manifest", "RecordBatch", "ShardInfo", "Totals", "folder_of"]

NAME = "manifest.json"
TABLE = "shards.arrow"
FORMAT_VERSION = 2


class Totals(NamedTuple):
    """Sums over all shards of a corpus."""

    rows: int
    source_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class CorpusInfo:
    """One corpus. `pairs` are in `shards`; `held_out.rows` records (token counts 0) are kept as text.

    `counts` says what became of the input: files, records, and what was left out or shortened, by reason. `shards` is
    a tuple, or, in a manifest that was read, a sequence that reads the table when it is asked; `totals` are counted
    from it when they are not given.
    """

    name: str
    weight: float
    task: str
    pairs: int
    shards: Sequence[ShardInfo]
    held_out: ShardInfo
    counts: dict[str, int]
    totals: Totals | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shards, TableShards):
            object.__setattr__(self, "shards", tuple(self.shards))
        if self.totals is None:
            counted = (sum(getattr(shard, name) for shard in self.shards) for name in Totals._fields)
            object.__setattr__(self, "totals", Totals(*counted))

    @property
    def rows(self) -> int:
        """Packed samples."""
        return self.totals.rows

    @property
    def target_tokens(self) -> int:
        """Label tokens of all samples."""
        return self.totals.target_tokens

    @property
    def source_tokens(self) -> int:
        """Source tokens of all samples."""
        return self.totals.source_tokens

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where samples lie: (number of the shard, row in the shard), int64 `[n]` each, for `rows` int64 `[n]`.

        A binary search per row. Raises DataError when a part of the table that it needs is damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        assert not len(rows) or (rows.min() >= 0 and rows.max() < self.rows), "no such row"
        if isinstance(self.shards, TableShards):
            return self.shards.find(rows)
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        return numbers, rows - self._first_rows[numbers]

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *(shard.rows for shard in self.shards)], dtype=np.int64)[:-1]


@dataclass(frozen=True)
class Manifest:
    """Prepared data of one data configuration and one state of its inputs, which `digest` stands for.

    `codebook_digest` is that of the codebook whose codes pictures became; None without pictures.
    """

    digest: str
    tokenizer_digest: str
    vocabulary_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    source_capacity: int
    target_capacity: int
    corpora: tuple[CorpusInfo, ...]
    layout: str = "pairs"
    packing: str = "best_fit"
    codebook_digest: str | None = None

    @property
    def folder(self) -> str:
        """Where it lies, relative to the storage root."""
        return folder_of(self.digest)

    @property
    def tokenizer_path(self) -> str:
        """`tokenizer.json`, relative to the storage root."""
        return f"{self.folder}/tokenizer.json"

    def corpus(self, name: str) -> CorpusInfo:
        """The corpus of that name; raises DataError when there is none."""
        for corpus in self.corpora:
            if corpus.name == name:
                return corpus
        names = ", ".join(corpus.name for corpus in self.corpora)
        raise DataError(f"{self.folder}/{NAME}: no corpus {name!r}; corpora there: {names}")

    def files(self) -> Iterator[ShardInfo]:
        """All shards and held-out files; reads the whole table."""
        for corpus in self.corpora:
            yield from corpus.shards
            yield corpus.held_out

    def summary(self) -> list[str]:
        """One line per corpus, for people: records, samples, tokens and how full the samples are."""
        return [
            f"{corpus.name}: {corpus.counts.get('records', 0):,} records and {corpus.held_out.rows:,} held out; "
            f"{corpus.rows:,} samples in {len(corpus.shards):,} shards hold {self._filling(corpus)}"
            for corpus in self.corpora
        ]

    def _filling(self, corpus: CorpusInfo) -> str:
        room = corpus.rows * self.target_capacity
        if self.layout == "sequence":
            used = corpus.source_tokens + corpus.target_tokens
            return f"{used:,} tokens ({used / room:.0%} full), {corpus.target_tokens:,} of them with loss"
        return (
            f"{corpus.target_tokens:,} target tokens ({corpus.target_tokens / room:.0%} full) and "
            f"{corpus.source_tokens:,} source tokens "
            f"({corpus.source_tokens / (corpus.rows * self.source_capacity):.0%} full)"
        )

    def write(self, storage: Storage) -> Manifest:
        """Write the table, then manifest.json, into the folder below `storage`; returns what `read` gives.

        The files listed must be there already: from here on the data counts as prepared.
        """
        inside = storage.child(self.folder)
        size, blocks = write_table(inside, TABLE, (corpus.shards for corpus in self.corpora))
        body = {each.name: getattr(self, each.name) for each in fields(self)}
        body["format_version"] = FORMAT_VERSION
        body["corpora"] = [
            {
                **{each.name: getattr(corpus, each.name) for each in fields(corpus) if each.name != "shards"},
                "held_out": asdict(corpus.held_out),
                "totals": corpus.totals._asdict(),
                "blocks": [astuple(block) for block in blocks_of_corpus],
            }
            for corpus, blocks_of_corpus in zip(self.corpora, blocks, strict=True)
        ]
        body["table_bytes"] = size
        body["content_digest"] = _digest_of(body)
        inside.write_text(NAME, json.dumps(body, indent=1))
        return Manifest.read(storage, self.folder)

    @classmethod
    def read(cls, storage: Storage, folder: str) -> Manifest:
        """The manifest in a data folder; raises DataError when it is absent, damaged or of another format version.

        Shards are looked up in the table when they are used, which raises DataError where the table is damaged.
        """
        path = f"{folder}/{NAME}"
        origin = f"{storage.url}/{path}"
        try:
            content = storage.read_bytes(path)
        except FileNotFoundError as error:
            raise DataError(
                f"{origin} does not exist: the data was removed or its preparation did not finish; run the prepare "
                "stage again"
            ) from error
        try:
            manifest = cls._from_json(content.decode(), origin, storage.child(folder))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{origin}: no manifest ({error}); remove the folder and prepare again") from error
        if manifest.folder != folder:
            raise DataError(f"{origin}: belongs to {manifest.folder}; move the folder back to that name")
        return manifest

    @classmethod
    def _from_json(cls, text: str, origin: str, inside: Storage) -> Manifest:
        body = json.loads(text)
        version = body.pop("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{origin}: prepared by another version of Telar (format {version}, this one reads {FORMAT_VERSION}); "
                "run the prepare stage again, then remove this folder"
            )
        stated = body.pop("content_digest")
        if stated != _digest_of({**body, "format_version": version}):
            raise DataError(f"{origin}: content does not match its digest; remove the folder and prepare again")
        blocks = tuple(tuple(TableBlock(*block) for block in corpus.pop("blocks")) for corpus in body["corpora"])
        table = ShardTable(inside, TABLE, body.pop("table_bytes"), blocks)
        corpora = [
            CorpusInfo(
                **{
                    **corpus,
                    "shards": TableShards(table, number),
                    "held_out": ShardInfo(**corpus["held_out"]),
                    "totals": Totals(**corpus["totals"]),
                }
            )
            for number, corpus in enumerate(body["corpora"])
        ]
        return cls(**{**body, "corpora": tuple(corpora)})

    def with_weights(self, weights: dict[str, float]) -> Manifest:
        """The same data mixed by other weights."""
        return replace(self, corpora=tuple(replace(c, weight=weights.get(c.name, c.weight)) for c in self.corpora))


def folder_of(digest: str) -> str:
    """Where data of a digest lies, relative to the storage root."""
    return f"data/{digest}"


def _digest_of(body: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
