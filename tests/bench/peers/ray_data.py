"""Ray Data: Parquet files, file shuffle and a local shuffle buffer, `iter_torch_batches`; a cluster of its own."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import DataContext, FileShuffleConfig
from torch import Tensor

from tests.bench.corpus import Corpus
from tests.bench.peers.protocol import NotSupported, Peer, Remote, Stream, View, main

BUFFER = 1024


class Epoch(Stream):
    def __init__(self, dataset: Any, view: View) -> None:
        if view.states:
            raise NotSupported("no state within an epoch")
        self._dataset, self._view = dataset, view

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._dataset.iter_torch_batches(
            batch_size=self._view.own, local_shuffle_buffer_size=BUFFER, local_shuffle_seed=self._view.seed,
            dtypes={"tokens": torch.int64},
        ):  # fmt: skip
            yield batch["tokens"]


class RayData(Peer):
    name = "ray_data"
    packages = ("ray", "pyarrow", "torch", "numpy")

    def write(self, corpus: Corpus, folder: Path) -> None:
        from ray.data.extensions import ArrowTensorArray

        folder.mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(corpus.all_shards()):
            table = pa.table({"tokens": ArrowTensorArray.from_numpy(rows)})
            pq.write_table(table, str(folder / f"{number:05}.parquet"), compression="none", use_dictionary=False)

    def start(self) -> None:
        """A local cluster that ends with this process."""
        if not ray.is_initialized():
            folder = tempfile.mkdtemp(prefix="tb-ray-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            atexit.register(ray.shutdown)
            ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                object_store_memory=1 << 30, _temp_dir=folder,
            )  # fmt: skip
            context = DataContext.get_current()
            context.enable_progress_bars = False
            context.execution_options.preserve_order = True

    def _read(self, paths: Any, view: View, **options: Any) -> Any:
        self.start()
        return ray.data.read_parquet(paths, shuffle=FileShuffleConfig(seed=view.seed), **options)

    def open(self, folder: Path, view: View) -> Stream:
        if view.ranks == 1:
            return Epoch(self._read(str(folder), view), view)
        if view.states:
            raise NotSupported("no state within an epoch")
        raise NotSupported("streaming_split hands blocks to whichever rank asks first: no global batch to compare")

    def mixture(self, folders: list[Path], weights: tuple[float, ...], view: View) -> Stream:
        raise NotSupported("no state within an epoch, and mix(weights) gives batches of one corpus per block")

    def remote(self, remote: Remote, view: View) -> Stream:
        from fsspec.implementations.http import HTTPFileSystem

        files = [f"{remote.url}/{path.name}" for path in sorted(remote.folder.glob("*.parquet"))]
        return Epoch(self._read(files, view, filesystem=HTTPFileSystem()), view)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(RayData())
