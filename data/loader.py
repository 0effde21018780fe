"""Serving prepared samples: each replica's micro-batches of each optimizer step, read ahead by a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from configs.schema import RunConfig
from data.batches import Batch, Collator
from data.manifest import Manifest, ShardInfo
from data.open_shards import OpenShard
from data.quarantine import shards_named
from data.reader import PLANNED_ROWS, SampleReader
from data.ring import Arrays, Ring
from data.share import Share
from data.state import check_state, make_state

# Steps that are read ahead of the consumer, and steps whose arrays it may still use.
STEPS_AHEAD = 2
STEPS_HELD = 2


class Loader:
    """Micro-batches of one replica, step by step from `start_step` (steps done before).

    The global batch of step s (from 0) is positions [s*B, (s+1)*B), B = `train.global_batch_sequences`; see `Share` for
    what of it is this replica's. Ranks that share a replica (tensor and pipeline peers) give equal `replica` and
    `replicas` and get equal batches.

    Arrays live in a ring of fixed size: those of a step are valid until `next_step` has been called twice more, and are
    then written over.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: RunConfig,
        open_shard: OpenShard,
        replica: int,
        replicas: int,
        start_step: int = 0,
    ) -> None:
        self._manifest, self._config = manifest, config
        self._share = Share(config.train.global_batch_sequences, config.train.micro_batch_sequences, replica, replicas)
        self._reader = SampleReader(manifest, config, open_shard)
        self._sequence = config.data.layout == "sequence"
        self._collator = Collator(
            self._sequence,
            self._share.micro_batch,
            manifest.source_capacity,
            manifest.target_capacity,
            manifest.pad_id,
            manifest.bos_id,
            fitted=config.data.bucket_batches > 0,
        )
        self._restore: Callable[[Sequence[ShardInfo]], None] | None = getattr(open_shard, "restore", None)
        self._known_quarantined: set[str] = set()
        self.data_wait_seconds = 0.0
        self._start(start_step)

    def next_step(self) -> list[Batch]:
        """This replica's micro-batches of the next step; raises what reading raised.

        `data_wait_seconds` tells afterwards how long this call waited.
        """
        if self._failed is not None:
            raise self._failed
        assert not self._closing.is_set(), "the loader is closed"
        started = time.perf_counter()
        if len(self._held) == STEPS_HELD:
            self._ring.give(self._held.popleft())
        item = self._ready.get()
        self.data_wait_seconds = time.perf_counter() - started
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        slot, batches = item
        self._held.append(slot)
        self._step += 1
        return batches

    __next__ = next_step

    def __iter__(self) -> Loader:
        return self

    def state(self) -> dict[str, Any]:
        """All that is needed to go on elsewhere, after the steps handed out so far; see `data.state.make_state`."""
        consumed = self._step * self._share.batch
        quarantined = sorted(self._known_quarantined.union(self._reader.quarantined))
        return make_state(self._manifest, self._config, consumed, quarantined)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at whatever number of replicas; nothing is read again.

        Shards that the state names as quarantined are told to the opener (its `restore`, if it has one). Raises
        DataError or ConfigError, naming both sides, when the state is of other data or of another order.
        """
        check_state(state, self._manifest, self._config)
        self.close()
        self._known_quarantined = set(state["quarantined"])
        if self._restore is not None:
            self._restore(shards_named(self._manifest, state["quarantined"]))
        self._start(state["samples_consumed"] // self._share.batch)

    state_dict = state
    load_state_dict = load_state

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; may be called twice."""
        self._closing.set()
        self._ring.close()
        self._thread.join()

    def _start(self, step: int) -> None:
        self._step = step
        self._ring = Ring(STEPS_AHEAD + STEPS_HELD, len(self._share.read), *self._collator.sizes)
        self._held: deque[list[Arrays]] = deque()
        # Bounded by the slots of the ring.
        self._ready: queue.SimpleQueue[tuple[list[Arrays], list[Batch]] | BaseException] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(step,), name="telar-loader", daemon=True)
        self._thread.start()

    def _work(self, step: int) -> None:
        try:
            for shards, rows in self._reader.steps(self._share, step):
                slot = self._ring.take()
                if slot is None or self._closing.is_set():
                    return
                self._ready.put((slot, self._batches(shards, rows, slot)))
        # Whatever went wrong belongs to the caller of next_step, in its own thread.
        except BaseException as error:  # noqa: BLE001
            self._ready.put(error)

    def _batches(self, shards: list[int], rows: list[int], slot: list[Arrays]) -> list[Batch]:
        share, read = self._share, []
        for number, (index, arrays) in enumerate(zip(share.read, slot, strict=True)):
            own = slice(number * share.micro_batch, (number + 1) * share.micro_batch)
            read.append(self._batch(shards[own], rows[own], index, arrays))
        copies = [index for index in share.indices if index >= share.micro_batches]
        real = read if len(copies) < len(share.indices) else []
        return real + [read[0].without_weight(index) for index in copies]

    def _batch(self, shards: list[int], rows: list[int], index: int, arrays: Arrays) -> Batch:
        if self._sequence:
            full = self._reader.full_rows(shards, rows, self._manifest.target_capacity)
            if full is not None:
                return self._collator.fill_full(full, index, arrays)
        found = [self._reader.row(*place) for place in zip(shards, rows, strict=True)]
        return self._collator.fill(found, index, arrays)


def consumed_pairs(
    manifest: Manifest, config: RunConfig, open_shard: OpenShard, steps: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(corpus name, labels) of every packed pair in steps [0, steps), in the order of training; labels are int64."""
    reader = SampleReader(manifest, config, open_shard)
    batch = config.train.global_batch_sequences
    at_once = max(1, PLANNED_ROWS // batch)
    for step in range(0, steps, at_once):
        positions = reader.positions(np.arange(step * batch, min(step + at_once, steps) * batch))
        corpora = np.repeat(reader.order(positions)[0], (samples := reader.read(positions)).pairs)
        ends = np.cumsum(samples.target_lengths)
        labels = samples.target.astype(np.int64)
        for corpus, size, end in zip(corpora.tolist(), samples.target_lengths.tolist(), ends.tolist(), strict=True):
            yield manifest.corpora[corpus].name, labels[end - size : end]


def consumed_targets(manifest: Manifest, config: RunConfig, open_shard: OpenShard, steps: int) -> Iterator[np.ndarray]:
    """Labels (eos included) of every packed pair in steps [0, steps), int64, in the order of training."""
    for _, labels in consumed_pairs(manifest, config, open_shard, steps):
        yield labels
