"""torchdata's StatefulDataLoader over a map-style Hugging Face dataset, the usual partner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler, StatefulDistributedSampler

from tests.bench.corpus import Corpus
from tests.bench.peers.hf_map import HfMap
from tests.bench.peers.protocol import NotSupported, Peer, Stream, View, main

datasets.disable_progress_bars()


def collate(samples: list[dict[str, Tensor]]) -> Tensor:
    return default_collate(samples)["tokens"]


class Epoch(Stream):
    def __init__(self, dataset: Any, view: View) -> None:
        if view.ranks > 1:
            sampler = StatefulDistributedSampler(
                dataset, num_replicas=view.ranks, rank=view.rank, shuffle=True, seed=view.seed
            )
        else:
            sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(view.seed))
        self._loader = StatefulDataLoader(
            dataset, batch_size=view.own, sampler=sampler, num_workers=view.workers, collate_fn=collate
        )
        if view.state is not None:
            self._loader.load_state_dict(view.state)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._loader)

    def state(self) -> Any:
        return self._loader.state_dict()


class TorchData(Peer):
    name = "torchdata"
    packages = ("torchdata", "datasets", "torch", "numpy")
    has_workers = True

    def write(self, corpus: Corpus, folder: Path) -> None:
        HfMap().write(corpus, folder)

    def open(self, folder: Path, view: View) -> Stream:
        return Epoch(Dataset.load_from_disk(str(folder / "data")).with_format("torch"), view)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        raise NotSupported("StatefulDataLoader mixes nothing itself")

    def plan(self, samples: int, folder: Path) -> None:
        sampler = RandomSampler(np.empty(samples, dtype=np.int8), generator=torch.Generator().manual_seed(1))
        assert next(iter(sampler)) is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(TorchData())
