"""A fixed number of slots of reused memory, handed between the thread that fills them and the one that reads them.

Where this process uses CUDA the memory is pinned, so that copies to the GPU need no staging and may run beside it.
"""

from __future__ import annotations

import queue
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Arrays:
    """Flat memory of one micro-batch; fields and types are those of `data.batches.Batch`."""

    source_tokens: np.ndarray
    source_positions: np.ndarray
    source_segments: np.ndarray
    target_tokens: np.ndarray
    target_positions: np.ndarray
    target_segments: np.ndarray
    labels: np.ndarray
    loss_weight: np.ndarray

    @classmethod
    def empty(cls, source: int, target: int, pinned: bool = False) -> Arrays:
        """Memory for `source` elements in each source array and `target` in each other one, not initialised."""

        def make(size: int, kind: type) -> np.ndarray:
            if not pinned:
                return np.empty(size, dtype=kind)
            import torch

            return torch.empty(size, dtype=getattr(torch, np.dtype(kind).name), pin_memory=True).numpy()

        return cls(
            *(make(source, kind) for kind in (np.int64, np.int32, np.int32)),
            *(make(target, kind) for kind in (np.int64, np.int32, np.int32, np.int64, np.float32)),
        )


def uses_cuda() -> bool:
    """Whether this process has initialised CUDA; imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def token_tensors(count: int, batch: int, width: int) -> list[tuple[Tensor, list[np.ndarray], np.ndarray]]:
    """`count` int64 tensors `[batch, width]`, each with its rows as arrays, and flat: NumPy casts as it copies."""
    import torch

    tensors = torch.empty(count, batch, width, dtype=torch.int64)
    return [(tensor, list(tensor.numpy()), tensor.numpy().reshape(-1)) for tensor in tensors]


class Ring:
    """`slots` slots of `micro_batches` micro-batches each, all made at once; none is added later."""

    def __init__(self, slots: int, micro_batches: int, source: int, target: int) -> None:
        pinned = uses_cuda()
        self._free: queue.SimpleQueue[list[Arrays] | None] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put([Arrays.empty(source, target, pinned) for _ in range(micro_batches)])

    def take(self) -> list[Arrays] | None:
        """A free slot, waiting for one; None once the ring is closed."""
        return self._free.get()

    def give(self, slot: list[Arrays]) -> None:
        """Free a slot."""
        self._free.put(slot)

    def close(self) -> None:
        """Let a waiting `take` return None."""
        self._free.put(None)
