"""Hugging Face datasets, streaming: Arrow files, buffer shuffle, `split_dataset_by_node`, `interleave_datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets import interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from tests.bench.corpus import Corpus
from tests.bench.peers.hf_map import features
from tests.bench.peers.protocol import Peer, Remote, Stream, View, main

datasets.disable_progress_bars()
# A quarter of the samples, at most 16,384, of which research/data.md tells.
LARGEST_BUFFER = 16_384


class Epoch(Stream):
    def __init__(self, dataset: Any, view: View) -> None:
        self._dataset, self._view = dataset, view
        if view.state is not None:
            dataset.load_state_dict(view.state)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._dataset.iter(batch_size=self._view.own):
            yield batch["tokens"]

    def state(self) -> Any:
        return self._dataset.state_dict()


class HfStream(Peer):
    name = "hf_stream"
    packages = ("datasets", "pyarrow", "torch", "numpy")

    def write(self, corpus: Corpus, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        schema = features(corpus.width).arrow_schema
        (folder / "samples").write_text(str(corpus.samples))
        for number, rows in enumerate(corpus.all_shards()):
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), corpus.width)
            table = pa.Table.from_arrays([column], schema=schema)
            with pa.ipc.new_stream(str(folder / f"{number:05}.arrow"), schema) as writer:
                writer.write_table(table, max_chunksize=256)

    def open(self, folder: Path, view: View) -> Stream:
        files = sorted(str(path) for path in folder.glob("*.arrow"))
        return self._open(files, int((folder / "samples").read_text()), view)

    def _open(self, files: list[str], samples: int, view: View) -> Stream:
        dataset = load_dataset("arrow", data_files=files, streaming=True, split="train")
        if view.ranks > 1:
            dataset = split_dataset_by_node(dataset, view.rank, view.ranks)
        dataset = dataset.shuffle(seed=view.seed, buffer_size=min(samples // 4, LARGEST_BUFFER))
        return Epoch(dataset.with_format("torch"), view)

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        parts = [
            load_dataset(
                "arrow", data_files=sorted(map(str, folder.glob("*.arrow"))), streaming=True, split="train"
            ).shuffle(seed=view.seed, buffer_size=1024)
            for folder in folders
        ]
        mixed = interleave_datasets(parts, probabilities=list(weights), seed=view.seed)
        if view.ranks > 1:
            mixed = split_dataset_by_node(mixed, view.rank, view.ranks)
        return Epoch(mixed.with_format("torch"), view)

    def remote(self, remote: Remote, view: View) -> Stream:
        names = sorted(path.name for path in remote.folder.glob("*.arrow"))
        files = [f"{remote.url}/{name}" for name in names]
        return self._open(files, int((remote.folder / "samples").read_text()), view)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(HfStream())
