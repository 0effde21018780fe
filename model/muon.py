"""Muon (Jordan 2024): matrices move by their orthogonalised momentum, however ranks share them; AdamW for the rest.

ZeRO keeps flat partitions that cut through matrices. Parts of one matrix are brought together for the Newton-Schulz
iteration alone, and only where several ranks hold them: at ZeRO 1 and 2 that is one matrix per border between ranks,
at ZeRO 3 each matrix, which then every rank orthogonalises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.sliced import Part, block_of, pieces, view

MOMENTUM = "momentum_buffer"
# The quintic a s + b s^3 + c s^5 that takes singular values in (0, 1] to about 1 soonest (Jordan 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """U p(S) V^T of `matrix [rows, columns]` = U S V^T, p(S) between 0.7 and 1.2 where S is not far below its norm.

    Newton-Schulz iteration; in the dtype given, which may be bfloat16.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Piece(NamedTuple):
    """Elements `start .. start + numel` of a flattened matrix of `shape`, at `offset` of this rank's flat partition.

    Where tensor ranks share the matrix, of its `part` flattened. `numel` 0: this rank holds nothing of the matrix.
    """

    shape: tuple[int, int]
    offset: int
    numel: int
    start: int
    part: Part | None = None

    def views(self, matrix: Tensor, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same elements in the whole matrix and in the flat partition, in at most 3 rectangles."""
        for block, at in pieces(block_of(self.shape, self.part), self.start, self.numel):
            yield block.of(matrix), view(flat, self.offset + at, block, block)


class MuonAdamW(torch.optim.AdamW):
    """Muon for parameter groups with `muon: True` and their `momentum`, AdamW for all others; one learning rate.

    A matrix moves by 0.2 sqrt(max(rows, columns)) times the rate, so that its steps are as large as AdamW's (Liu et
    al. 2025, section 2.2). The gradient's mean runs with Nesterov's look-ahead, as in Jordan's code.
    """

    def __init__(self, groups: list[dict[str, Any]], **shared: Any) -> None:
        super().__init__(groups, **shared)
        self._pieces: dict[Tensor, list[tuple[Piece, bool]]] = {}
        self._group: Any = None

    def lay_out(self, pieces: Mapping[Tensor, Sequence[Piece]], group: Any = None) -> None:
        """Say what this rank's flat partitions hold; on all ranks of the process group `group` (None: of all) together,
        with the matrices in the same order.
        """
        self._pieces.clear()
        self._group = group
        for partition, own in pieces.items():
            holders = torch.tensor([float(piece.numel > 0) for piece in own], device=partition.device)
            dist.all_reduce(holders, group=group)
            self._pieces[partition] = list(zip(own, (holders > 1).tolist(), strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of what has gradients; on all ranks that were laid out together."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                for partition in group["params"]:
                    if partition.grad is not None:
                        self._orthogonal_step(partition, group)
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step(closure)
        finally:
            self.param_groups = groups

    def _orthogonal_step(self, partition: Tensor, group: dict[str, Any]) -> None:
        state, rate, beta = self.state[partition], group["lr"], group["momentum"]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(partition)
        mean = state[MOMENTUM].lerp_(partition.grad, 1.0 - beta)
        ahead = partition.grad.lerp(mean, beta)
        partition.mul_(1.0 - rate * group["weight_decay"])
        # Half the bytes and many times the speed on a GPU; a CPU has no use for bfloat16.
        dtype = torch.bfloat16 if partition.device.type == "cuda" else torch.float32
        for piece, is_shared in self._pieces[partition]:
            if not is_shared and not piece.numel:
                continue
            whole = torch.zeros(piece.shape, dtype=dtype, device=partition.device)
            for there, here in piece.views(whole, ahead):
                there.copy_(here)
            if is_shared:
                # Each element is of one rank and 0 on all others: the sum is exact.
                dist.all_reduce(whole, group=self._group)
            if piece.numel:
                for update, here in piece.views(orthogonalised(whole), partition):
                    here.add_(update, alpha=-rate * 0.2 * math.sqrt(max(piece.shape)))
