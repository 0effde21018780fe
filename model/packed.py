"""Matrices in 8 and 4 bits: how they are rounded, how they lie in memory, and products with them.

Scales are bfloat16, so that a matrix `[out, in]` takes 1 + 2 / in bytes per weight in int8 and 0.5 + 2 / group in
int4 (group 64: 0.531, 7.5 times less than float32). Rounding is symmetric around 0 and no zero points are stored.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of a matrix that exist as floats at one time.
CHUNK_ELEMENTS = 2**20
# Levels of an int8 number on one side of 0; how much finer the second byte of an activation is than the first.
LEVELS, FINE = 127, 254
TINY = 1e-30
# int4: the factors on the scale that takes in a group's largest weight, of which the one with the least error is used.
SHRINKING = tuple(1.0 - 0.04 * i for i in range(9))


class PackedWeight(nn.Module):
    """A matrix `[out, in]` of integers and scales in place of a parameter; subclasses say in which form.

    `dtype` is that of what it gives, float32.
    """

    kind: str
    dtype = torch.float32

    def __init__(self, values: Tensor, scale: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.shape = torch.Size(shape)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.values.device

    @abstractmethod
    def rows(self, index: Tensor | slice) -> Tensor:
        """Float32 rows `[n, in]` of the matrix; `index` is a slice or int64 `[n]`."""

    def dense(self) -> Tensor:
        """The whole matrix, float32 `[out, in]`."""
        return self.rows(slice(None))

    def look_up(self, tokens: Tensor) -> Tensor:
        """Rows by number: ints `[...]` -> float32 `[..., in]`."""
        return self.rows(tokens.flatten().long()).unflatten(0, tokens.shape)

    def linear(self, x: Tensor) -> Tensor:
        """`x @ W.T`, `[..., in]` -> `[..., out]`; about CHUNK_ELEMENTS weights exist as floats at a time."""
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        starts = range(0, self.shape[0], step)
        parts = [F.linear(x, self.rows(slice(start, start + step)).to(x.dtype)) for start in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Int8Weight(PackedWeight):
    """`values` int8 `[out, in]`, `scale` bfloat16 `[out]`: W = values * scale per output channel.

    Products are of integers, accumulated in int32 (`torch._int_mm`): each row of x is rounded to multiples of 1/32258
    of its largest element, which two rows of int8 hold. So x is exact to 15 bits, and no matrix is unpacked.
    """

    kind = "int8-weight"

    def rows(self, index: Tensor | slice) -> Tensor:
        """See `PackedWeight`."""
        return self.values[index].float() * self.scale[index].float().unsqueeze(-1)

    def linear(self, x: Tensor) -> Tensor:
        """`x @ W.T`, `[..., in]` -> `[..., out]`."""
        flat = x.flatten(0, -2).float()
        if not len(flat):
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        step, sums = self._integers(flat)
        return sums.mul_(step).mul_(self.scale.float()).to(x.dtype).unflatten(0, x.shape[:-1])

    def _integers(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 steps `[n, 1]` that the rows of `flat [n, in]` are rounded to, and products in them `[n, out]`."""
        step = _step(flat)
        scaled = flat / step
        coarse = scaled.round()
        fine = scaled.sub_(coarse).mul_(FINE).round_()
        sums = torch._int_mm(torch.cat((coarse, fine)).to(torch.int8), self.values.t()).float()
        return step, sums[: len(flat)].add_(sums[len(flat) :], alpha=1 / FINE)


class DynamicInt8Weight(Int8Weight):
    """As `Int8Weight` with x rounded to int8, each row by its own largest element. Looked-up rows are as there."""

    kind = "int8-dynamic"

    def _integers(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        step = _step(flat)
        return step, torch._int_mm((flat / step).round_().to(torch.int8), self.values.t()).float()


def _step(flat: Tensor) -> Tensor:
    """A 127th of each row's largest element, `[n, 1]`, above 0."""
    return flat.abs().amax(-1, keepdim=True).clamp_(min=TINY).div_(LEVELS)


class Int4Weight(PackedWeight):
    """`values` uint8 `[out, padded / 2]`, `scale` bfloat16 `[out, padded / group]`, padded: `in` in whole groups.

    Each byte holds two neighbours of a row, the first in its low half; W = (half - 8) * scale of its group.
    """

    kind = "int4-group"

    @property
    def group(self) -> int:
        """Weights of a row that share a scale."""
        return 2 * self.values.shape[1] // self.scale.shape[1]

    def rows(self, index: Tensor | slice) -> Tensor:
        """See `PackedWeight`."""
        packed = self.values[index]
        halves = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        grouped = halves.to(torch.float32).sub_(8.0).unflatten(1, (-1, self.group))
        return grouped.mul_(self.scale[index].float().unsqueeze(-1)).flatten(1)[:, : self.shape[1]]


KINDS: dict[str, type[PackedWeight]] = {kind.kind: kind for kind in (Int8Weight, DynamicInt8Weight, Int4Weight)}


def pack(weight: Tensor, kind: str, group: int = 64) -> PackedWeight:
    """Round a matrix `[out, in]` to one of KINDS; `group` (even) is for int4.

    int8 is off by at most half a scale, and its scale is the row's largest weight / 127 rounded up to bfloat16. int4
    takes, for each group, the scale among SHRINKING times the largest (largest weight at -8) with the least squared
    error; weights beyond +7 scales are cut off there.
    """
    weight = weight.detach().float()
    if kind == Int4Weight.kind:
        return Int4Weight(*_round_groups(weight, group), weight.shape)
    scale = _rounded_up(weight.abs().amax(1) / LEVELS)
    values = (weight / scale.float().unsqueeze(1)).round_().to(torch.int8)
    return KINDS[kind](values, scale, weight.shape)


def stored(kind: str, values: Tensor, scale: Tensor, shape: tuple[int, ...]) -> PackedWeight:
    """A matrix of `shape` from its flat tensors, as they were flattened when it was written."""
    rows = shape[0]
    scale = scale.view(rows, -1) if kind == Int4Weight.kind else scale
    return KINDS[kind](values.view(rows, -1), scale, torch.Size(shape))


def _rounded_up(scale: Tensor) -> Tensor:
    """The least bfloat16 that is not below, and above 0, so that nothing leaves the range of the integers."""
    scale = scale.clamp(min=TINY)
    near = scale.to(torch.bfloat16)
    up = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < scale, up, near)


def _round_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    padded = F.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    unit = torch.where(largest == 0, 1.0, largest)
    best = torch.full_like(largest, torch.inf)
    scale, halves = torch.zeros_like(largest), torch.zeros_like(padded)
    for factor in SHRINKING:
        # Signed: the largest weight, whatever its sign, lies on the side that has one level more.
        tried = (largest * (-factor / 8)).to(torch.bfloat16).float()
        safe = torch.where(tried == 0, 1.0, tried)
        levels = (padded / safe).round_().clamp_(-8, 7)
        # In units of the largest weight: squares of huge weights would be infinite.
        error = ((levels * tried - padded) / unit).square().sum(-1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        halves = torch.where(better, levels, halves)
    halves = (halves + 8).to(torch.uint8).flatten(1)
    return halves[:, 0::2] | (halves[:, 1::2] << 4), scale.squeeze(-1).to(torch.bfloat16)


def project(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`x @ weight.T` for a parameter or a packed matrix."""
    return weight.linear(x) if isinstance(weight, PackedWeight) else F.linear(x, weight)


def look_up(tokens: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Rows of a parameter or of a packed matrix: ints `[...]` -> `[..., in]`."""
    return weight.look_up(tokens) if isinstance(weight, PackedWeight) else F.embedding(tokens, weight)
