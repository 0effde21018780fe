"""Samples by position: plans many positions at once, finds their shards and reads rows from memory maps.

Planning a position by itself costs a hundred times what it costs among thousands, so positions are planned a window
at a time. Memory is that of two windows, whatever the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from configs.errors import DataError
from configs.schema import RunConfig
from data.buckets import arrange
from data.manifest import Manifest, ShardInfo
from data.mixture import make_order
from data.open_shards import OpenShard, OpenShards
from data.quarantine import QuarantinedShard
from data.shards import Row, Samples, gather
from data.share import Share

PLANNED_ROWS = 8192


@dataclass(frozen=True)
class Plan:
    """Where samples lie: shard numbers (over all corpora) and rows in those shards, int64 `[samples]` each."""

    shards: np.ndarray
    rows: np.ndarray

    def steps(self, rows: int) -> Iterator[tuple[list[int], list[int]]]:
        """The plan in pieces of `rows` samples."""
        shards, places = self.shards.tolist(), self.rows.tolist()
        for start in range(0, len(shards), rows):
            yield shards[start : start + rows], places[start : start + rows]

    def in_first_use(self) -> np.ndarray:
        """The shard numbers, each once, in order of first use."""
        numbers, first = np.unique(self.shards, return_index=True)
        return numbers[np.argsort(first)]


class SampleReader:
    """Samples of the order of a run, through memory-mapped shards of which a bounded number is open."""

    def __init__(self, manifest: Manifest, config: RunConfig, open_shard: OpenShard) -> None:
        data = config.data
        self._corpora = manifest.corpora
        self.order = make_order(manifest, config)
        counts = [len(corpus.shards) for corpus in manifest.corpora]
        self._first_shards = np.concatenate([[0], np.cumsum(counts)])
        blocks = data.lanes * data.window_blocks * len(counts)
        self._open = OpenShards(self._shard, open_shard, blocks)
        self._announce: Callable[[Sequence[ShardInfo]], None] | None = getattr(open_shard, "prefetch", None)
        self._bucket_steps, self._micro_batch = data.bucket_batches, config.train.micro_batch_sequences
        self._bucket_rows = data.bucket_batches * config.train.global_batch_sequences
        self._sequence, self._seed = data.layout == "sequence", config.run.seed
        self._arranged: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def quarantined(self) -> list[str]:
        """Paths of the shards whose samples were masked."""
        return self._open.quarantined

    def read(self, positions: np.ndarray) -> Samples:
        """The samples at `positions`, in that order, copied; those of quarantined shards have no pairs."""
        plan = self.plan(positions)
        places = zip(plan.shards.tolist(), plan.rows.tolist(), strict=True)
        return gather([self.row(*place) for place in places])

    def shards(self, positions: np.ndarray) -> list[ShardInfo]:
        """Shards that hold the samples at `positions`, each once, in order of first use."""
        return [self._shard(number) for number in self.plan(positions).in_first_use().tolist()]

    def plan(self, positions: np.ndarray) -> Plan:
        """Where the samples at `positions` lie; nothing is opened."""
        corpora, _, rows = self.order(positions)
        shards, places = np.empty_like(rows), np.empty_like(rows)
        for corpus in np.flatnonzero(np.bincount(corpora)).tolist():
            own = np.flatnonzero(corpora == corpus)
            found, places[own] = self._corpora[corpus].find(rows[own])
            shards[own] = found + self._first_shards[corpus]
        return Plan(shards, places)

    def row(self, shard: int, row: int) -> Row:
        """One row by the numbers of a plan, as views of the memory map."""
        block, at = self._open.find(shard, row)
        return block.row(at)

    def full_rows(self, shards: Sequence[int], rows: Sequence[int], width: int) -> list[np.ndarray] | None:
        """The labels of rows that all are one pair of `width` labels without source; see `OpenShards.full_rows`."""
        return self._open.full_rows(shards, rows, width)

    def steps(self, share: Share, step: int) -> Iterator[tuple[list[int], list[int]]]:
        """Where the samples lie that `share` reads in each step from `step` on, without end; see `Plan.steps`.

        Before a window is read, its shards and those of the next one are announced to the opener.
        """
        if self._bucket_steps:
            return self._bucketed(share, step)
        steps = -(-PLANNED_ROWS // share.rows)
        return self._planned(lambda number: share.places(step + number * steps, steps), share.rows)

    def consecutive(self, start: int, batch: int) -> Iterator[tuple[list[int], list[int]]]:
        """Like `steps`, of `batch` positions at a time from `start` on; length buckets are ignored."""
        rows = -(-PLANNED_ROWS // batch) * batch
        return self._planned(lambda number: np.arange(start + number * rows, start + (number + 1) * rows), batch)

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Positions in the order of the samples that stand at `places` of the run: other ones with buckets only."""
        if not self._bucket_rows:
            return places
        result = np.empty_like(places)
        windows = places // self._bucket_rows
        for window in np.unique(windows).tolist():
            own = np.flatnonzero(windows == window)
            start = window * self._bucket_rows
            result[own] = start + self._arrangement(window)[places[own] - start]
        return result

    def _planned(self, window: Callable[[int], np.ndarray], rows: int) -> Iterator[tuple[list[int], list[int]]]:
        """The plans of positions `window(0)`, `window(1)`, ..., in pieces of `rows`, announced a window ahead."""
        plan = self.plan(window(0))
        for number in count(1):
            after = self.plan(window(number))
            self._announce_all(plan, after)
            yield from plan.steps(rows)
            plan = after

    def _bucketed(self, share: Share, step: int) -> Iterator[tuple[list[int], list[int]]]:
        size = self._bucket_rows
        for window in count(step // self._bucket_steps):
            # The lengths of all samples of a window decide where they stand: every replica looks at all of them.
            if self._announce:
                self._announce_all(self.plan(np.arange(window * size, (window + 2) * size)))
            end = (window + 1) * self._bucket_steps
            yield from self.plan(self.positions(share.places(step, end - step))).steps(share.rows)
            step = end

    def _announce_all(self, *plans: Plan) -> None:
        """Tell the opener which shards come next; what was announced before is past."""
        if self._announce:
            shards = dict.fromkeys(number for plan in plans for number in plan.in_first_use().tolist())
            self._announce([self._shard(number) for number in shards])

    def _arrangement(self, window: int) -> np.ndarray:
        """Which sample of a window of buckets stands at each of its places."""
        if self._arranged[0] != window:
            start = window * self._bucket_rows
            plan = self.plan(np.arange(start, start + self._bucket_rows))
            source, target = self._lengths(plan)
            if self._sequence:
                source, target = np.zeros_like(source), source + target
            arranged = arrange(source, target, seed=self._seed, window=window, micro_batch=self._micro_batch)
            self._arranged = (window, arranged)
        return self._arranged[1]

    def _lengths(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Source tokens and label tokens of planned samples, int64 `[samples]` each."""
        source, target = np.empty_like(plan.rows), np.empty_like(plan.rows)
        for shard in plan.in_first_use().tolist():
            own = np.flatnonzero(plan.shards == shard)
            try:
                source[own], target[own] = self._open.lengths(shard, plan.rows[own])
            except QuarantinedShard as error:
                # Ranks that had read the shard before would place the window's samples otherwise.
                raise DataError(
                    f"data.bucket_batches: {error}, and without them a window of buckets cannot be arranged; set it "
                    "to 0, or remove the shard's file and run the prepare stage again"
                ) from error
        return source, target

    def _shard(self, number: int) -> ShardInfo:
        corpus = int(np.searchsorted(self._first_shards, number, side="right")) - 1
        return self._corpora[corpus].shards[number - int(self._first_shards[corpus])]
