"""Serving prepared samples: each replica's micro-batches of each optimizer step, read ahead by a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from configs.schema import RunConfig
from data.batches import Batch, collate
from data.manifest import Manifest, ShardInfo
from data.mixture import make_order
from data.shards import Samples, ShardReader, gather

STEPS_AHEAD = 2
OPEN_SHARDS = 256
# Steps whose shards are announced to the opener before they are read.
ANNOUNCED_STEPS = 64
OPEN_TRIES = 3

OpenShard = Callable[[ShardInfo], str]


class SampleReader:
    """Samples by position, through memory-mapped shards; keeps the most recently used shards open."""

    def __init__(self, manifest: Manifest, config: RunConfig, open_shard: OpenShard) -> None:
        self._manifest, self._open_shard = manifest, open_shard
        self.order = make_order(manifest, config)
        self._first_rows = [
            np.concatenate([[0], np.cumsum([shard.rows for shard in corpus.shards])]) for corpus in manifest.corpora
        ]
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()

    def read(self, positions: np.ndarray) -> Samples:
        """The samples at `positions`, in that order."""
        return gather([self._reader(shard).row(row) for shard, row in self._places(positions)])

    def shards(self, positions: np.ndarray) -> list[ShardInfo]:
        """Shards that hold the samples at `positions`, each once, in order of first use."""
        return list(dict.fromkeys(shard for shard, _ in self._places(positions)))

    def _places(self, positions: np.ndarray) -> Iterator[tuple[ShardInfo, int]]:
        corpora, _, rows = self.order(positions)
        for corpus, row in zip(corpora.tolist(), rows.tolist(), strict=True):
            first = self._first_rows[corpus]
            number = int(np.searchsorted(first, row, side="right")) - 1
            yield self._manifest.corpora[corpus].shards[number], row - int(first[number])

    def _reader(self, shard: ShardInfo) -> ShardReader:
        reader = self._readers.get(shard.path)
        if reader is None:
            reader = self._readers[shard.path] = self._open(shard)
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(shard.path)
        return reader

    def _open(self, shard: ShardInfo) -> ShardReader:
        for attempt in range(1, OPEN_TRIES + 1):
            try:
                return ShardReader(self._open_shard(shard), shard)
            except FileNotFoundError:
                # A full cache may evict the file between its path being told and its being mapped.
                if attempt == OPEN_TRIES:
                    raise
        raise AssertionError("unreachable")


class Loader:
    """Micro-batches of one replica, step by step from `start_step` (steps done before).

    The global batch of step s (from 0) is positions [s*B, (s+1)*B), B = `train.global_batch_sequences`, cut into a
    fixed list of micro-batches of `train.micro_batch_sequences`. Replica r takes micro-batches r, r + replicas, ...;
    where they do not divide, the last replicas get a copy without weight, so that all have equally many.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: RunConfig,
        open_shard: OpenShard,
        replica: int,
        replicas: int,
        start_step: int,
    ) -> None:
        assert 0 <= replica < replicas
        self._manifest, self._seed = manifest, config.run.seed
        self._reader = SampleReader(manifest, config, open_shard)
        self._announce = getattr(open_shard, "prefetch", None)
        self._micro = config.train.micro_batch_sequences
        self._global = config.train.global_batch_sequences
        self._replica, self._replicas = replica, replicas
        self._step = start_step
        self.data_wait_seconds = 0.0
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(STEPS_AHEAD)
        self._closing = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="telar-loader", daemon=True)
        self._thread.start()

    def next_step(self) -> list[Batch]:
        """This replica's micro-batches of the next step; raises what reading raised.

        `data_wait_seconds` tells afterwards how long this call waited.
        """
        if self._failed is not None:
            raise self._failed
        assert not self._closing.is_set(), "the loader is closed"
        started = time.perf_counter()
        item = self._ready.get()
        self.data_wait_seconds = time.perf_counter() - started
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        self._step += 1
        return item

    __next__ = next_step

    def __iter__(self) -> Loader:
        return self

    def state(self) -> dict[str, Any]:
        """All that is needed to go on elsewhere: digest of the data, seed, and samples consumed by steps handed out."""
        return {"data_digest": self._manifest.digest, "seed": self._seed, "samples_consumed": self._step * self._global}

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; may be called twice."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self, step: int) -> None:
        try:
            while not self._closing.is_set():
                if self._announce is not None and step % (ANNOUNCED_STEPS // 2) == 0:
                    ahead = np.arange(step * self._global, (step + ANNOUNCED_STEPS) * self._global)
                    self._announce(self._reader.shards(ahead))
                self._put(self._batches(step))
                step += 1
        # Whatever went wrong belongs to the caller of next_step, in its own thread.
        except BaseException as error:  # noqa: BLE001
            self._put(error)

    def _put(self, item: list[Batch] | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _batches(self, step: int) -> list[Batch]:
        total = self._global // self._micro
        batches: list[Batch] = []
        for turn in range(-(-total // self._replicas)):
            index = self._replica + turn * self._replicas
            if index < total:
                batches.append(self._batch(step, index))
            else:
                copied = batches[0] if batches else self._batch(step, index % total)
                batches.append(copied.without_weight(index))
        return batches

    def _batch(self, step: int, index: int) -> Batch:
        first = step * self._global + index * self._micro
        return collate(
            self._reader.read(np.arange(first, first + self._micro)),
            index,
            self._manifest.source_capacity,
            self._manifest.target_capacity,
            self._manifest.pad_id,
            self._manifest.bos_id,
        )


def consumed_pairs(
    manifest: Manifest, config: RunConfig, open_shard: OpenShard, steps: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(corpus name, labels) of every packed pair in steps [0, steps), in the order of training; labels are int64."""
    reader = SampleReader(manifest, config, open_shard)
    batch = config.train.global_batch_sequences
    for step in range(steps):
        positions = np.arange(step * batch, (step + 1) * batch)
        corpora = np.repeat(reader.order(positions)[0], (samples := reader.read(positions)).pairs)
        pieces = np.split(samples.target.astype(np.int64), np.cumsum(samples.target_lengths)[:-1])
        for corpus, labels in zip(corpora.tolist(), pieces, strict=True):
            yield manifest.corpora[corpus].name, labels


def consumed_targets(manifest: Manifest, config: RunConfig, open_shard: OpenShard, steps: int) -> Iterator[np.ndarray]:
    """Labels (eos included) of every packed pair in steps [0, steps), int64, in the order of training."""
    for _, labels in consumed_pairs(manifest, config, open_shard, steps):
        yield labels
