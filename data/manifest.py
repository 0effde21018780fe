"""The manifest of prepared data: what was made, with digests. Written once, last; immutable from then on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import xxhash

from cluster.storage import Storage
from configs.errors import DataError

NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One file: `path` relative to the data folder, `digest` xxh3-128 in hex. Token counts are of all rows."""

    path: str
    rows: int
    source_tokens: int
    target_tokens: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class CorpusInfo:
    """One corpus. `pairs` are in `shards`; `held_out.rows` records (token counts 0) are kept as text.

    `counts` says what became of the input: files, records, and what was left out or shortened, by reason.
    """

    name: str
    weight: float
    task: str
    pairs: int
    shards: tuple[ShardInfo, ...]
    held_out: ShardInfo
    counts: dict[str, int]

    @property
    def rows(self) -> int:
        """Packed samples."""
        return sum(shard.rows for shard in self.shards)

    @property
    def target_tokens(self) -> int:
        """Label tokens of all samples."""
        return sum(shard.target_tokens for shard in self.shards)

    @property
    def source_tokens(self) -> int:
        """Source tokens of all samples."""
        return sum(shard.source_tokens for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """Prepared data of one data configuration and one state of its inputs, which `digest` stands for."""

    digest: str
    tokenizer_digest: str
    vocabulary_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    source_capacity: int
    target_capacity: int
    corpora: tuple[CorpusInfo, ...]
    format_version: int = FORMAT_VERSION

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

    def files(self) -> list[ShardInfo]:
        """All shards and held-out files."""
        return [file for corpus in self.corpora for file in (*corpus.shards, corpus.held_out)]

    def summary(self) -> list[str]:
        """One line per corpus, for people: records, samples, tokens and how full the samples are."""
        return [
            f"{corpus.name}: {corpus.counts.get('records', 0):,} records and {corpus.held_out.rows:,} held out; "
            f"{corpus.rows:,} samples in {len(corpus.shards)} shards hold {corpus.target_tokens:,} target tokens "
            f"({corpus.target_tokens / (corpus.rows * self.target_capacity):.0%} full) and "
            f"{corpus.source_tokens:,} source tokens "
            f"({corpus.source_tokens / (corpus.rows * self.source_capacity):.0%} full)"
            for corpus in self.corpora
        ]

    def to_json(self) -> str:
        """JSON text; its last field is a digest of all others."""
        body = asdict(self)
        body["content_digest"] = _digest_of(body)
        return json.dumps(body, indent=1)

    @classmethod
    def from_json(cls, text: str, origin: str = NAME) -> Manifest:
        """Inverse of `to_json`; raises DataError when the text is damaged or of another format version."""
        try:
            body = json.loads(text)
            version = body["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(
                    f"{origin}: format version {version}, this code reads {FORMAT_VERSION}; prepare the data again"
                )
            stated = body.pop("content_digest")
            if stated != _digest_of(body):
                raise DataError(f"{origin}: content does not match its digest; remove the folder and prepare again")
            corpora = tuple(
                CorpusInfo(
                    **{
                        **corpus,
                        "shards": tuple(ShardInfo(**shard) for shard in corpus["shards"]),
                        "held_out": ShardInfo(**corpus["held_out"]),
                    }
                )
                for corpus in body["corpora"]
            )
            return cls(**{**body, "corpora": corpora})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{origin}: no manifest ({error}); remove the folder and prepare again") from error

    @classmethod
    def read(cls, storage: Storage, folder: str) -> Manifest:
        """The manifest in a data folder; raises DataError when it is absent or damaged."""
        path = f"{folder}/{NAME}"
        try:
            text = storage.read_text(path)
        except FileNotFoundError as error:
            raise DataError(
                f"{storage.url}/{path} does not exist: the data was removed or its preparation did not finish; run "
                "the prepare stage again"
            ) from error
        manifest = cls.from_json(text, f"{storage.url}/{path}")
        if manifest.folder != folder:
            raise DataError(f"{storage.url}/{path}: belongs to {manifest.folder}; move the folder back to that name")
        return manifest

    def with_weights(self, weights: dict[str, float]) -> Manifest:
        """The same data mixed by other weights."""
        return replace(self, corpora=tuple(replace(c, weight=weights.get(c.name, c.weight)) for c in self.corpora))


def folder_of(digest: str) -> str:
    """Where data of a digest lies, relative to the storage root."""
    return f"data/{digest}"


def _digest_of(body: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
