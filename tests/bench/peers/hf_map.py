"""Hugging Face datasets, map style: one Arrow folder, `.shuffle` (an index table), torch format."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from tests.bench.corpus import Corpus
from tests.bench.peers.protocol import NotSupported, Peer, Stream, View, main

datasets.disable_progress_bars()


class Epoch(Stream):
    """`iter(batch_size)` over the shuffled dataset. There is no state: the user counts samples and skips them."""

    def __init__(self, dataset: Any, view: View) -> None:
        self._dataset, self._view = dataset, view

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._dataset.iter(batch_size=self._view.own):
            yield batch["tokens"]

    def state(self) -> Any:
        return {}


def features(width: int) -> Features:
    return Features({"tokens": List(Value("uint16"), length=width)})


class HfMap(Peer):
    name = "hf_map"
    packages = ("datasets", "pyarrow", "torch", "numpy")

    def write(self, corpus: Corpus, folder: Path) -> None:
        def rows(shards: list[int]) -> Iterator[dict[str, np.ndarray]]:
            for number in shards:
                for row in corpus.shard(number):
                    yield {"tokens": row}

        dataset = Dataset.from_generator(
            rows, features=features(corpus.width), gen_kwargs={"shards": list(range(corpus.shards))},
            cache_dir=str(folder / "cache"),
        )  # fmt: skip
        dataset.save_to_disk(str(folder / "data"), num_shards=corpus.shards)
        shutil.rmtree(folder / "cache")

    def open(self, folder: Path, view: View) -> Stream:
        dataset = Dataset.load_from_disk(str(folder / "data")).shuffle(seed=view.seed, load_from_cache_file=False)
        # What users do for lack of a state: the shuffle is seeded, so the rows that were read can be skipped by number.
        dataset = dataset.select(range(view.consumed, len(dataset)))
        if view.ranks > 1:
            view.own  # noqa: B018 - raises when the batch does not divide
            dataset = dataset.shard(view.ranks, view.rank, contiguous=False)
        return Epoch(dataset.with_format("torch"), view)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        raise NotSupported("interleave_datasets of map datasets; measured with hf_stream")

    def write_plan(self, samples: int, folder: Path) -> None:
        table = pa.table({"x": pa.array(np.zeros(samples, dtype=np.int8))})
        Dataset(table).save_to_disk(str(folder / "data"))

    def plan(self, samples: int, folder: Path) -> None:
        dataset = Dataset.load_from_disk(str(folder / "data")).shuffle(seed=1, load_from_cache_file=False)
        assert dataset[0] is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(HfMap())
