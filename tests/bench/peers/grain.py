"""Grain: ArrayRecord files, MapDataset with index shuffle, ElasticIterator, best-fit packing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter
from grain import experimental
from grain.sources import ArrayRecordDataSource
from torch import Tensor

from tests.bench.corpus import Corpus
from tests.bench.peers.protocol import Peer, Stream, View, main

PACKING_BINS = 64


def decode(record: bytes) -> np.ndarray:
    return np.frombuffer(record, dtype=np.uint16)


class Epoch(Stream):
    """One rank: every n-th sample of the shuffled MapDataset, in batches."""

    def __init__(self, dataset: Any, view: View) -> None:
        if view.ranks > 1:
            dataset = dataset[view.rank :: view.ranks]
        self._batches = dataset.batch(view.own).to_iter_dataset()
        self._state, self._iterator = view.state, None

    def __iter__(self) -> Iterator[Tensor]:
        self._iterator = iter(self._batches)
        if self._state is not None:
            self._iterator.set_state(self._state)
        for batch in self._iterator:
            yield torch.from_numpy(batch.astype(np.int64))

    def state(self) -> Any:
        return self._iterator.get_state()


class Elastic(Stream):
    """Grain's ElasticIterator, whose state is of the global batch."""

    def __init__(self, dataset: Any, view: View) -> None:
        view.own  # noqa: B018 - raises when the batch does not divide
        shard = grain.sharding.ShardOptions(view.rank, view.ranks)
        self._iterator = experimental.ElasticIterator(dataset, view.batch, shard)
        if view.states:
            self._iterator.set_state(view.states[0])

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._iterator:
            yield torch.from_numpy(batch.astype(np.int64))

    def state(self) -> Any:
        return self._iterator.get_state()


class Grain(Peer):
    name = "grain"
    packages = ("grain", "array-record", "torch", "numpy")

    def write(self, corpus: Corpus, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(corpus.all_shards()):
            writer = ArrayRecordWriter(str(folder / f"{number:05}.arrayrecord"), "group_size:1,uncompressed")
            for row in rows:
                writer.write(row.tobytes())
            writer.close()

    def _dataset(self, folder: Path, view: View) -> Any:
        source = ArrayRecordDataSource(sorted(str(path) for path in folder.glob("*.arrayrecord")))
        return grain.MapDataset.source(source).shuffle(seed=view.seed).map(decode)

    def open(self, folder: Path, view: View) -> Stream:
        dataset = self._dataset(folder, view)
        return Elastic(dataset, view) if view.batch == 24 else Epoch(dataset, view)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        parts = [self._dataset(folder, view) for folder in folders]
        return Elastic(grain.MapDataset.mix(parts, weights), view)

    def plan(self, samples: int, folder: Path) -> None:
        assert grain.MapDataset.range(samples).shuffle(seed=1)[0] is not None

    def pack(self, documents: list[Any], width: int, folder: Path) -> Iterator[tuple[Any, Any, Any]]:
        # A document that is longer than a row must be cut first; Grain packs whole elements only.
        pieces = [doc[at : at + width] for doc in documents for at in range(0, len(doc), width)]
        dataset = grain.MapDataset.source(pieces).map(lambda piece: {"tokens": piece}).to_iter_dataset()
        packed = experimental.BestFitPackIterDataset(
            dataset, length_struct={"tokens": width}, num_packing_bins=PACKING_BINS
        )
        for row in packed:
            segments = row["tokens_segment_ids"]
            yield row["tokens"], segments, segments == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Grain())
