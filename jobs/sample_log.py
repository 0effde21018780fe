"""Which samples every step used, written down while training: none may be lost or doubled over recoveries."""

from __future__ import annotations

import json
from collections.abc import Sequence

import xxhash

from cluster.storage import SpooledText, Storage
from jobs.loop import Batches
from model.batch import ModelBatch


class LoggedBatches:
    """Batches that are logged as they are handed out; to be closed.

    A line in `samples/attempt-AAA-rank-RRRRR.jsonl` per step: attempt, step, and the XXH3-64 digest of each row's
    tokens and labels. Micro-batches without weight, which fill up a replica's share, are no samples.
    """

    def __init__(self, batches: Batches, folder: Storage, attempt: int, rank: int, step: int) -> None:
        """`step`: steps done before."""
        self._batches, self._attempt, self._step = batches, attempt, step
        self._text = SpooledText(folder, f"samples/attempt-{attempt:03d}-rank-{rank:05d}.jsonl")

    @property
    def data_wait_seconds(self) -> float:
        """Seconds that the latest step waited for data."""
        return self._batches.data_wait_seconds

    def next_step(self) -> Sequence[ModelBatch]:
        """Micro-batches of the next optimizer step."""
        batches = self._batches.next_step()
        self._step += 1
        real = (batch for batch in batches if bool((batch.loss_weight != 0).any()))
        samples = [digest for batch in real for digest in _digests(batch)]
        self._text.append(json.dumps({"attempt": self._attempt, "step": self._step, "samples": samples}))
        return batches

    def close(self) -> None:
        """Write everything out."""
        self._text.close()


def _digests(batch: ModelBatch) -> list[str]:
    fields = [array.numpy() for array in (*batch.inputs, batch.labels)]
    return [
        xxhash.xxh3_64_hexdigest(b"".join(field[row].tobytes() for field in fields)) for row in range(len(fields[0]))
    ]
