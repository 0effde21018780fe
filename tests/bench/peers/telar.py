"""Telar: TokenBatches for bare tokens (workloads 1 to 4), Loader for ranks, mixtures and the throttled store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.storage import Storage
from configs.data_section import DataSection
from configs.load import parse_config
from configs.schema import RunConfig
from data.loader import Loader
from data.manifest import CorpusInfo, Manifest, ShardInfo
from data.opener import CacheOpener, CacheSettings, cache_folder
from data.reader import SampleReader
from data.rows import RowFormat, rows_of
from data.shards import write_shard
from data.token_batches import TokenBatches
from tests.bench.corpus import Corpus
from tests.bench.peers.protocol import Peer, Remote, Stream, View, main

DIGEST = "bench"
VOCABULARY = 1 << 16
PAD, BOS, EOS = 0, 1, 2
BLOCK_ROWS = DataSection.model_fields["block_rows"].default
# Micro-batches of the workloads with several ranks; 8 of them do not divide by 3 or 6 ranks.
MICRO_BATCH = 3
PLAN_SHARD = 1024
NOTHING = np.empty(0, dtype=np.uint16)


def make_config(width: int, view: View, corpora: list[str], **data: Any) -> RunConfig:
    tree = {
        "run": {"seed": view.seed},
        "data": {
            "corpora": [{"name": name, "kind": "text", "path": "none", "target": "{text}"} for name in corpora],
            "layout": "sequence",
            "target_tokens": width,
            **data,
        },
        "train": {
            "steps": 1,
            "global_batch_sequences": view.batch,
            "micro_batch_sequences": MICRO_BATCH if view.batch % MICRO_BATCH == 0 else view.batch,
        },
    }
    return parse_config(tree, "benchmark")


def make_manifest(width: int, corpora: list[CorpusInfo]) -> Manifest:
    return Manifest(DIGEST, "none", VOCABULARY, PAD, BOS, EOS, 1, width, tuple(corpora), "sequence", "chunk")


def local_opener(storage: Storage, manifest: Manifest) -> CacheOpener:
    """Local shards are used in place, each hashed once by the processes of a workload."""
    tokens = sum(corpus.target_tokens for corpus in manifest.corpora)
    return CacheOpener(CacheSettings(storage.url, manifest.folder, tokens), cache_folder())


class Tokens(Stream):
    """TokenBatches up to the end of the first epoch; asked again, the next one."""

    def __init__(self, folder: Path, view: View) -> None:
        storage = Storage(str(folder))
        manifest = Manifest.read(storage, f"data/{DIGEST}")
        config = make_config(manifest.target_capacity, view, [corpus.name for corpus in manifest.corpora])
        self._rows = sum(corpus.rows for corpus in manifest.corpora)
        start = view.state["samples_consumed"] if view.state else 0
        self._batches = TokenBatches(manifest, config, local_opener(storage, manifest), view.own, start)

    def __iter__(self) -> Iterator[Tensor]:
        end = (self._batches.position // self._rows + 1) * self._rows
        while (left := end - self._batches.position) > 0:
            batch = next(self._batches)
            yield batch[:left] if left < len(batch) else batch

    def state(self) -> Any:
        return {"samples_consumed": self._batches.position}


class Steps(Stream):
    """A Loader's steps up to sample `samples` of the run; samples without weight (copies, masked ones) are left out."""

    def __init__(self, manifest: Manifest, config: RunConfig, opener: Any, view: View, samples: int) -> None:
        self._opener, self._batch, self._samples = opener, view.batch, samples
        self._micro = config.train.micro_batch_sequences
        self._loader = Loader(manifest, config, opener, view.rank, view.ranks)
        if view.states:
            self._loader.load_state(view.states[0])

    def __iter__(self) -> Iterator[Tensor]:
        while (first := self._loader.state()["samples_consumed"]) < self._samples:
            parts = [torch.empty(0, 2, dtype=torch.int64)]
            for micro in self._loader.next_step():
                positions = first + micro.index * self._micro + np.arange(len(micro.labels))
                real = (positions < self._samples) & (micro.loss_weight.sum(axis=1) > 0)
                parts.append(torch.from_numpy(micro.labels[real]))
            yield torch.cat([part for part in parts if len(part)] or parts[:1])

    def state(self) -> Any:
        return self._loader.state()

    def close(self) -> None:
        self._loader.close()
        self._opener.close()


class Telar(Peer):
    name = "telar"

    def write(self, corpus: Corpus, folder: Path) -> None:
        storage = Storage(str(folder))
        inside = storage.child(f"data/{DIGEST}")
        shards = [
            write_shard(
                inside,
                f"shards/{number:05}.arrow",
                ([(NOTHING, row)] for row in corpus.shard(number)),
                VOCABULARY,
                BLOCK_ROWS,
            )
            for number in range(corpus.shards)
        ]
        info = CorpusInfo(corpus.name, 1.0, "likelihood", corpus.samples, tuple(shards), shards[0], {})
        make_manifest(corpus.width, [info]).write(storage)

    def open(self, folder: Path, view: View) -> Stream:
        if view.batch % MICRO_BATCH:
            return Tokens(folder, view)
        storage = Storage(str(folder))
        manifest = Manifest.read(storage, f"data/{DIGEST}")
        config = make_config(manifest.target_capacity, view, [manifest.corpora[0].name])
        return Steps(manifest, config, local_opener(storage, manifest), view, manifest.corpora[0].rows)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        paths, corpora = {}, []
        for folder, weight in zip(folders, weights, strict=True):
            storage = Storage(str(folder))
            corpus = (read := Manifest.read(storage, f"data/{DIGEST}")).corpora[0]
            paths |= {shard.digest: storage.local_path(f"{read.folder}/{shard.path}") for shard in corpus.shards}
            shards = tuple(corpus.shards)
            corpora.append(CorpusInfo(corpus.name, weight, "likelihood", corpus.rows, shards, shards[0], {}))
        manifest = make_manifest(read.target_capacity, corpora)
        config = make_config(read.target_capacity, view, [corpus.name for corpus in corpora])
        # The three corpora lie in folders of their own here, so no opener of the project finds them.
        return Steps(manifest, config, Known(paths), view, corpora[0].rows)

    def write_plan(self, samples: int, folder: Path) -> None:
        shards = tuple(
            ShardInfo(f"shards/{number:07}.arrow", PLAN_SHARD, 0, PLAN_SHARD, 1, f"{number:032x}")
            for number in range(-(-samples // PLAN_SHARD))
        )
        info = CorpusInfo("plan", 1.0, "likelihood", len(shards) * PLAN_SHARD, shards, shards[0], {})
        make_manifest(8, [info]).write(Storage(str(folder)))

    def plan(self, samples: int, folder: Path) -> None:
        manifest = Manifest.read(Storage(str(folder)), f"data/{DIGEST}")
        reader = SampleReader(manifest, make_config(8, View(8), ["plan"]), Known({}))
        assert len(reader.plan(np.arange(8)).rows) == 8

    def remote(self, remote: Remote, view: View) -> Stream:
        storage = Storage(remote.url)
        manifest = Manifest.read(storage, f"data/{DIGEST}")
        corpus = manifest.corpora[0]
        # What the run's own advice says of data that are larger than the cache (`data.opener.cache_advice`).
        by_shards = {"block_rows": corpus.rows // len(corpus.shards), "lanes": 1, "window_blocks": 1}
        config = make_config(manifest.target_capacity, view, [corpus.name], **by_shards)
        # One shard of these few is far more than the 0.1% of tokens that may be masked by default.
        settings = CacheSettings(
            remote.url,
            manifest.folder,
            corpus.target_tokens,
            remote.cache_bytes,
            quarantine_fraction=1.5 / len(corpus.shards),
        )
        return Steps(manifest, config, CacheOpener(settings, str(remote.cache)), view, corpus.rows)

    def pack(self, documents: list[Any], width: int, folder: Path) -> Iterator[tuple[Any, Any, Any]]:
        """Best fit of layout sequence. A piece that continues a document repeats one token before it, without loss."""
        end = VOCABULARY
        texts = ((NOTHING.astype(np.int32), document[:-1].astype(np.int32)) for document in documents)
        form = RowFormat("sequence", "best_fit", 1, width)
        for row in rows_of(texts, form, end, 1, Counter()):
            tokens, segments = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
            pad, at = np.ones(width, dtype=bool), 0
            for segment, (source, labels) in enumerate(row, 1):
                full = np.concatenate([source, labels])
                # The end token stands for the document's last token.
                tokens[at : at + len(full)] = np.where(full == end, full[0], full)
                segments[at : at + len(full)] = segment
                pad[at + len(source) : at + len(full)] = False
                at += len(full)
            yield tokens, segments, pad

    def versions(self) -> dict[str, str]:
        import subprocess

        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return {"commit": commit or "unknown", "torch": torch.__version__, "numpy": np.__version__}


class Known:
    """Opens shards whose paths are known by digest, without checks."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = paths

    def __call__(self, shard: ShardInfo) -> str:
        return self._paths[shard.digest]

    def close(self) -> None:
        """Nothing is held."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Telar())
