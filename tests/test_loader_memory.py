"""Resident memory, file descriptors and memory maps of a loader stay flat over epochs."""

import ctypes
import gc
from pathlib import Path

import numpy as np
import psutil
import pytest

from data import open_shards
from data.loader import Loader
from data.shard_server import plain_opener
from tests.sample_data import prepare_samples

SHARDS, SHARD_ROWS, CAPACITIES, BATCH = 40, 48, (1, 256), 12
STEPS = SHARDS * SHARD_ROWS // BATCH
EPOCHS = 10
MAPS = 8
# An epoch's batches take 16 MB, its shards 2 MB, a plan of positions 1 MB: whatever of these is kept for each epoch
# (or each time a shard is opened) exceeds this in the 8 epochs measured; what Python's allocator does is less.
MOST_GROWTH_BYTES = 6 * 2**20


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that trains for 10 epochs with far fewer maps and record batches than there are shards."""
    monkeypatch.setattr(open_shards, "LEAST_MAPS", MAPS)
    monkeypatch.setattr(open_shards, "LEAST_BLOCKS", MAPS)
    samples = [[(np.empty(0, int), np.arange(256 * i, 256 * i + 256))] for i in range(SHARDS * SHARD_ROWS)]
    config, storage, manifest = prepare_samples(
        tmp_path, {"only": samples}, "sequence", CAPACITIES, SHARD_ROWS, global_batch_sequences=BATCH
    )
    del samples

    def epochs(after_step=lambda batches: None):
        """Resident bytes, file descriptors and mapped shards after each epoch."""
        opened, plain = [], plain_opener(storage, manifest)

        def open_shard(shard):
            opened.append(shard.path)
            return plain(shard)

        loader, usage = Loader(manifest, config, open_shard, 0, 1), []
        try:
            for _ in range(EPOCHS):
                for _ in range(STEPS):
                    after_step(loader.next_step())
                usage.append(measured(tmp_path))
        finally:
            loader.close()
        assert len(opened) > 2 * EPOCHS * SHARDS, "shards were closed and opened again"
        return usage

    return epochs


def measured(folder):
    gc.collect()
    # Memory that earlier tests freed goes back to the system: what grows must not find room in it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return psutil.Process().memory_info().rss, len(list(Path("/proc/self/fd").iterdir())), len(maps)


def test_memory_files_and_maps_are_flat_over_ten_epochs(run):
    usage = run()
    resident, files, maps = zip(*usage, strict=True)
    assert max(resident[2:]) - resident[1] < MOST_GROWTH_BYTES, [size >> 10 for size in resident]
    assert max(files) - min(files) <= 1, files
    # The table of shards is mapped too; a map just replaced may await its reader's end.
    assert max(maps) <= MAPS + 3, maps


def test_a_consumer_that_keeps_its_batches_would_be_noticed(run):
    kept = []
    resident = [usage[0] for usage in run(lambda batches: kept.extend(batch.labels.copy() for batch in batches))]
    assert max(resident[2:]) - resident[1] > 2 * MOST_GROWTH_BYTES
