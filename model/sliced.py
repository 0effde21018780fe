"""What a tensor rank holds of each parameter: a record on the parameter, and ranges of slices as ranges of wholes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Part(NamedTuple):
    """Indices `start .. stop` of a dimension of a whole parameter, all of the others."""

    dimension: int
    start: int
    stop: int


@dataclass(frozen=True)
class Slice:
    """The part of rank `rank` of `size` in a dimension of `full` elements, as even as it goes."""

    dimension: int
    full: int
    rank: int
    size: int

    @property
    def start(self) -> int:
        """First index held."""
        return self.full * self.rank // self.size

    @property
    def stop(self) -> int:
        """Index behind the last one held."""
        return self.full * (self.rank + 1) // self.size

    def of(self, whole: Tensor) -> Tensor:
        """The part, as a view of the whole tensor."""
        return whole.narrow(self.dimension, self.start, self.stop - self.start)


def mark(parameter: nn.Parameter, part: Slice) -> nn.Parameter:
    """Record that `parameter` is this part of the whole one; nothing is recorded when it is all of it."""
    if part.size > 1:
        parameter.sliced = part
        # What DeepSpeed looks at when it counts each element of the gradient once.
        parameter.tensor_model_parallel = parameter.model_parallel = True
    return parameter


def part_of(parameter: Tensor) -> Part | None:
    """What this tensor rank holds of the parameter, None for all of it."""
    part = slice_of(parameter)
    return None if part is None else Part(part.dimension, part.start, part.stop)


def slice_of(parameter: Tensor) -> Slice | None:
    """The record, None for a parameter that every tensor rank holds whole."""
    return getattr(parameter, "sliced", None)


def mark_copy(parameter: nn.Parameter) -> None:
    """Record that an earlier stage of the pipeline holds the same parameter: a tied embedding matrix."""
    # What DeepSpeed looks at when it counts each element of the gradient once.
    parameter.ds_pipe_replicated = True


def is_copy(parameter: Tensor) -> bool:
    """Whether an earlier stage holds the same parameter."""
    return getattr(parameter, "ds_pipe_replicated", False)


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of this tensor rank's part, also where ZeRO-3 keeps a flat piece of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter over all tensor ranks."""
    shape, part = list(local_shape(parameter)), slice_of(parameter)
    if part is not None:
        shape[part.dimension] = part.full
    return tuple(shape)


class Block(NamedTuple):
    """Rows `top..bottom` and columns `left..right` of a parameter seen as a matrix (a vector: as one column)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.right - self.left

    @property
    def size(self) -> int:
        """Number of elements."""
        return (self.bottom - self.top) * self.width

    def of(self, matrix: Tensor) -> Tensor:
        """The block as a view of the whole matrix."""
        return matrix[self.top : self.bottom, self.left : self.right]


def block_of(shape: Sequence[int], part: Part | None) -> Block:
    """The block of a parameter of full `shape` that `part` is; None: the whole.

    Dimensions behind the second count as columns, and only the first two are ever cut.
    """
    rows, columns = shape[0], 1
    for size in shape[1:]:
        columns *= size
    if part is None:
        return Block(0, rows, 0, columns)
    dimension, start, stop = part
    if dimension == 0:
        return Block(start, stop, 0, columns)
    assert dimension == 1
    each = columns // shape[1]
    return Block(0, rows, start * each, stop * each)


def pieces(block: Block, start: int, numel: int) -> Iterator[tuple[Block, int]]:
    """Elements `start .. start + numel` of the flattened block: at most 3 blocks, with their offsets in the range."""
    stop, at = start + numel, start
    while at < stop:
        row, column = divmod(at, block.width)
        whole_rows = (stop - at) // block.width
        if column or not whole_rows:
            taken = min(stop - at, block.width - column)
            left = block.left + column
            yield Block(block.top + row, block.top + row + 1, left, left + taken), at - start
        else:
            taken = whole_rows * block.width
            yield Block(block.top + row, block.top + row + whole_rows, block.left, block.right), at - start
        at += taken


def common(one: Block, other: Block) -> Block | None:
    """Where two blocks overlap."""
    top, bottom = max(one.top, other.top), min(one.bottom, other.bottom)
    left, right = max(one.left, other.left), min(one.right, other.right)
    return Block(top, bottom, left, right) if top < bottom and left < right else None


def view(flat: Tensor, offset: int, held: Block, wanted: Block) -> Tensor:
    """`wanted`, inside `held`, as a view `[rows, columns]` of the flat tensor that has `held` from `offset` on."""
    start = offset + (wanted.top - held.top) * held.width + wanted.left - held.left
    return flat.as_strided(
        (wanted.bottom - wanted.top, wanted.width), (held.width, 1), flat.storage_offset() + start * flat.stride(0)
    )
