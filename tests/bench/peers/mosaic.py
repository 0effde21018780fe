"""mosaicml-streaming: MDS shards, py1e shuffle, StreamingDataLoader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World
from torch import Tensor

from tests.bench.corpus import Corpus
from tests.bench.peers import protocol
from tests.bench.peers.protocol import Peer, Remote, View, main

PLAN_SHARD = 1024


def collate(samples: list[dict[str, np.ndarray]]) -> Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


class Epoch(protocol.Stream):
    def __init__(self, dataset: StreamingDataset, view: View) -> None:
        self._loader = StreamingDataLoader(
            dataset, batch_size=view.own, num_workers=view.workers, collate_fn=collate, drop_last=False
        )
        if view.state is not None:
            self._loader.load_state_dict(view.state)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._loader)

    def state(self) -> Any:
        return self._loader.state_dict()


class PlannedRank(protocol.Stream):
    """A rank among several, in one process: the ids that Mosaic's own `generate_work` gives it, read by `dataset[id]`.

    Its leader calls the same function for all ranks of a node; only the shared memory between processes is left out.
    """

    def __init__(self, dataset: StreamingDataset, view: View) -> None:
        state = view.states[0] if view.states else {}
        consumed = state.get("sample_in_epoch", 0)
        dataset.num_canonical_nodes = state.get("num_canonical_nodes", 1)
        dataset.initial_physical_nodes = state.get("initial_physical_nodes")
        dataset.batch_size = view.own
        dataset._set_shuffle_block_size(World(1, view.ranks, 1, 0))
        work = generate_work(dataset.batching_method, dataset, World(1, view.ranks, 1, 0), 0, consumed)
        self._dataset, self._view, self._consumed = dataset, view, consumed
        self._ids = work[0, view.rank, 0]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._ids:
            samples = [self._dataset[int(number)] for number in batch if number != -1]
            if samples:
                self._consumed += self._view.batch
                yield collate(samples)

    def state(self) -> Any:
        return {"sample_in_epoch": self._consumed, "num_canonical_nodes": 1, "initial_physical_nodes": 1}


class Mosaic(Peer):
    name = "mosaic"
    packages = ("mosaicml-streaming", "torch", "numpy")
    has_workers = True

    def __init__(self) -> None:
        self._datasets: dict[str, StreamingDataset] = {}

    def write(self, corpus: Corpus, folder: Path) -> None:
        # A shard is closed when the next sample would pass the limit; a sample costs 4 bytes more in the offsets.
        limit = corpus.rows * (corpus.width * 2 + 4) + 2048
        columns = {"tokens": f"ndarray:uint16:{corpus.width}"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=limit, hashes=["sha1"]) as writer:
            for rows in corpus.all_shards():
                for row in rows:
                    writer.write({"tokens": row})

    def open(self, folder: Path, view: View) -> protocol.Stream:
        if view.ranks > 1 or len(view.states) > 1:
            view.own  # noqa: B018 - raises when the batch does not divide
            if str(folder) not in self._datasets:
                clean_stale_shared_memory()
                self._datasets[str(folder)] = StreamingDataset(local=str(folder), **self._options(view))
            return PlannedRank(self._datasets[str(folder)], view)
        clean_stale_shared_memory()
        return Epoch(StreamingDataset(local=str(folder), **self._options(view)), view)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> protocol.Stream:
        # Samples of the epoch: the size of the first corpus, so that none of the corpora is read twice.
        key = "+".join(map(str, folders))
        if view.ranks > 1 or len(view.states) > 1:
            if key not in self._datasets:
                clean_stale_shared_memory()
                self._datasets[key] = self._mixed(folders, weights, view)
            return PlannedRank(self._datasets[key], view)
        clean_stale_shared_memory()
        return Epoch(self._mixed(folders, weights, view), view)

    def _mixed(self, folders: list[Path], weights: tuple[float, ...], view: View) -> StreamingDataset:
        streams = [Stream(local=str(f), proportion=w) for f, w in zip(folders, weights, strict=True)]
        index = json.loads((folders[0] / "index.json").read_text())
        size = sum(shard["samples"] for shard in index["shards"])
        return StreamingDataset(streams=streams, epoch_size=size, **self._options(view))

    def _options(self, view: View) -> dict[str, Any]:
        return {"batch_size": view.own, "shuffle": True, "shuffle_seed": view.seed, "num_canonical_nodes": 1}

    def write_plan(self, samples: int, folder: Path) -> None:
        shard = {
            "column_encodings": ["int"], "column_names": ["x"], "column_sizes": [8], "compression": None,
            "format": "mds", "hashes": [], "samples": PLAN_SHARD, "size_limit": 1 << 26, "version": 2,
            "zip_data": None,
        }  # fmt: skip
        shards = [
            {**shard, "raw_data": {"basename": f"shard.{number:07}.mds", "bytes": 12 * PLAN_SHARD, "hashes": {}}}
            for number in range(-(-samples // PLAN_SHARD))
        ]
        (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))

    def plan(self, samples: int, folder: Path) -> None:
        clean_stale_shared_memory()
        # Without remote, every shard must be there; a remote makes the shards merely not downloaded yet.
        dataset = StreamingDataset(
            remote=str(folder), local=str(folder.with_suffix(".local")), batch_size=8, shuffle=True,
            num_canonical_nodes=1,
        )  # fmt: skip
        dataset._set_shuffle_block_size(World(1, 1, 1, 0))
        assert generate_work(dataset.batching_method, dataset, World(1, 1, 1, 0), 0, 0)[0, 0, 0, 0, 0] >= 0

    def remote(self, remote: Remote, view: View) -> protocol.Stream:
        """Mosaic has no HTTP: the directory stands for the remote, neither slow nor failing; hashes are checked."""
        clean_stale_shared_memory()
        dataset = StreamingDataset(
            remote=str(remote.folder), local=str(remote.cache), cache_limit=remote.cache_bytes, validate_hash="sha1",
            **self._options(view),
        )  # fmt: skip
        return Epoch(dataset, view)


if __name__ == "__main__":
    main(Mosaic())
