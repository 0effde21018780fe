"""litdata: chunks of bare tokens read by TokensLoader, StreamingDataLoader, CombinedStreamingDataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader, optimize
from litdata.utilities.env import _DistributedEnv
from torch import Tensor

from tests.bench.corpus import Corpus
from tests.bench.peers.protocol import Peer, Remote, Stream, View, main

PLAN_SHARD = 1024


def shard_rows(number: int, corpus: Corpus) -> Iterator[Tensor]:
    for row in corpus.shard(number):
        yield torch.from_numpy(row)


def as_they_are(document: np.ndarray) -> Tensor:
    return torch.from_numpy(document)


class Epoch(Stream):
    def __init__(self, dataset: Any, view: View) -> None:
        self._loader = StreamingDataLoader(dataset, batch_size=view.own, num_workers=view.workers, drop_last=False)
        if view.states:
            # The states of all ranks are equal but for what a rank counts; litdata saves rank 0's.
            self._loader.load_state_dict(view.states[0])

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._loader:
            yield batch.to(torch.int64)

    def state(self) -> Any:
        return self._loader.state_dict()


class LitData(Peer):
    name = "litdata"
    packages = ("litdata", "torch", "numpy")
    has_workers = True

    def write(self, corpus: Corpus, folder: Path) -> None:
        optimize(
            fn=partial(shard_rows, corpus=corpus), inputs=list(range(corpus.shards)), output_dir=str(folder),
            chunk_size=corpus.rows * corpus.width, item_loader=TokensLoader(), num_workers=1, verbose=False,
        )  # fmt: skip
        (folder / "width").write_text(str(corpus.width))

    def _dataset(self, folder: Path, view: View, **options: Any) -> StreamingDataset:
        width = int((folder / "width").read_text())
        dataset = StreamingDataset(
            str(folder), item_loader=TokensLoader(width), shuffle=True, drop_last=False, seed=view.seed, **options
        )
        if view.ranks > 1:
            # What torch.distributed or the environment would tell in a process of its own.
            dataset.distributed_env = _DistributedEnv(view.ranks, view.rank, 1)
        return dataset

    def open(self, folder: Path, view: View) -> Stream:
        return Epoch(self._dataset(folder, view), view)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        parts = [self._dataset(folder, view) for folder in folders]
        mixed = CombinedStreamingDataset(parts, seed=view.seed, weights=list(weights), iterate_over_all=False)
        return Epoch(mixed, view)

    def write_plan(self, samples: int, folder: Path) -> None:
        chunk = {"chunk_bytes": PLAN_SHARD * 2 + 12, "chunk_size": 1, "dim": PLAN_SHARD}
        chunks = [{**chunk, "filename": f"chunk-0-{n}.bin"} for n in range(-(-samples // PLAN_SHARD))]
        config = {
            "chunk_bytes": None, "chunk_size": PLAN_SHARD, "compression": None, "data_format": ["no_header_tensor:18"],
            "data_spec": json.dumps([1, None]), "encryption": None, "item_loader": "TokensLoader",
        }  # fmt: skip
        written = folder.parent / "plan-format"
        if not written.exists():
            optimize(
                fn=as_they_are, inputs=[np.zeros(64, dtype=np.uint16)], output_dir=str(written), chunk_size=64,
                item_loader=TokensLoader(), num_workers=1, verbose=False,
            )  # fmt: skip
        config = json.loads((written / "index.json").read_text())["config"]
        (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config, "updated_at": "0"}))

    def plan(self, samples: int, folder: Path) -> None:
        dataset = StreamingDataset(str(folder), item_loader=TokensLoader(1), shuffle=True)
        dataset.get_len(1, 8)
        chunks, intervals = dataset.shuffler.get_chunks_and_intervals_per_workers(dataset.distributed_env, 1, 8, 1)
        start, stop = intervals[0][0][1:3]
        assert len(dataset.shuffler(np.arange(start, stop), len(chunks[0]), 1, 0)) == stop - start

    def remote(self, remote: Remote, view: View) -> Stream:
        """litdata has no HTTP: `local:` copies the directory's chunks into a cache, without throttling or errors."""
        dataset = StreamingDataset(
            f"local:{remote.folder}", cache_dir=str(remote.cache), shuffle=True, drop_last=False, seed=view.seed,
            item_loader=TokensLoader(int((remote.folder / "width").read_text())), max_cache_size=remote.cache_bytes,
        )  # fmt: skip
        return Epoch(dataset, view)

    def pack(self, documents: list[Any], width: int, folder: Path) -> Iterator[tuple[Any, Any, Any]]:
        optimize(
            fn=as_they_are, inputs=documents, output_dir=str(folder), chunk_size=width * 512,
            item_loader=TokensLoader(), num_workers=1, verbose=False,
        )  # fmt: skip
        nothing = np.zeros(width, dtype=bool)
        for row in StreamingDataset(str(folder), item_loader=TokensLoader(width), shuffle=False, drop_last=False):
            yield row.numpy(), None, nothing


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(LitData())
