"""Which samples of a step are whose: the fixed list of micro-batches of a global batch, dealt to replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """What replica `replica` of `replicas` takes of every global batch of `batch` samples.

    A global batch is a fixed list of `batch // micro_batch` micro-batches. Replica r takes micro-batches r,
    r + replicas, ...; where they do not divide, the last replicas get a copy without weight, so that all have equally
    many. Tensor and pipeline peers of one replica have equal shares.
    """

    batch: int
    micro_batch: int
    replica: int
    replicas: int

    def __post_init__(self) -> None:
        assert 0 <= self.replica < self.replicas and self.batch % self.micro_batch == 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, those of all replicas, without copies."""
        return self.batch // self.micro_batch

    @property
    def indices(self) -> list[int]:
        """Numbers of this replica's micro-batches of a step; numbers past the last real one are copies."""
        turns = -(-self.micro_batches // self.replicas)
        return [self.replica + turn * self.replicas for turn in range(turns)]

    @property
    def read(self) -> list[int]:
        """Micro-batches that are read: the real ones of `indices`, or one to make a copy of."""
        return [index for index in self.indices if index < self.micro_batches] or [self.replica % self.micro_batches]

    @property
    def rows(self) -> int:
        """Samples that are read for a step."""
        return len(self.read) * self.micro_batch

    def places(self, step: int, steps: int) -> np.ndarray:
        """Places in the run of the samples that are read for steps [step, step + steps), int64 `[steps * rows]`."""
        rows = (np.array(self.read)[:, None] * self.micro_batch + np.arange(self.micro_batch)).ravel()
        return (np.arange(step, step + steps)[:, None] * self.batch + rows).ravel()
