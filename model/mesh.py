"""Which rank stands where: data, pipeline and tensor axes as pure functions, and the process groups along each axis.

Ranks are numbered with tensor fastest and data slowest, so that the ranks that exchange most (tensor) are neighbours,
those of one model replica follow each other, and pipeline neighbours are one tensor size apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

AXES = ("data", "pipeline", "tensor")


class Place(NamedTuple):
    """Coordinates of a rank, each from 0."""

    data: int
    pipeline: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes; their product is the number of ranks."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.pipeline * self.tensor

    def place(self, rank: int) -> Place:
        """Coordinates of a rank."""
        assert 0 <= rank < self.size
        rest, tensor = divmod(rank, self.tensor)
        data, pipeline = divmod(rest, self.pipeline)
        return Place(data, pipeline, tensor)

    def rank(self, place: Place) -> int:
        """The inverse of `place`."""
        assert all(0 <= at < getattr(self, axis) for axis, at in zip(AXES, place, strict=True))
        return (place.data * self.pipeline + place.pipeline) * self.tensor + place.tensor

    def lines(self, axis: str) -> list[list[int]]:
        """Ranks that differ along `axis` alone, by their coordinate on it; every rank is in one line."""
        found: dict[Place, list[int]] = {}
        for rank in range(self.size):
            found.setdefault(self.place(rank)._replace(**{axis: 0}), []).append(rank)
        return list(found.values())

    def stages(self) -> list[list[int]]:
        """Ranks that hold the same layers, by stage."""
        return [[rank for rank in range(self.size) if self.place(rank).pipeline == at] for at in range(self.pipeline)]


@dataclass(frozen=True)
class Axis:
    """This process's place on one axis; `group` is the process group along it, unused at size 1."""

    size: int = 1
    rank: int = 0
    group: Any = None


ALONE = Axis()


@dataclass(frozen=True)
class ParallelContext:
    """The axes of the mesh that this process computes on; by default one process without torch.distributed."""

    data: Axis = ALONE
    pipeline: Axis = ALONE
    tensor: Axis = ALONE
    mesh: Mesh = field(default_factory=Mesh)
    stage_group: Any = None
    """Process group of the ranks that hold the same layers, all data and tensor ranks; None: all ranks."""

    @property
    def counts(self) -> bool:
        """Whether what all tensor ranks of a stage know alike is to be counted here."""
        return self.tensor.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether what all ranks of a replica know alike is to be counted here."""
        return self.tensor.rank == 0 and self.pipeline.rank == 0


def join(mesh: Mesh, timeout: timedelta) -> ParallelContext:
    """Make the process groups of the mesh; called on all its ranks together, when the default group is there."""
    assert dist.get_world_size() == mesh.size, f"{dist.get_world_size()} ranks for {mesh}"
    place = mesh.place(dist.get_rank())
    axes = {axis: _axis(mesh, axis, getattr(place, axis), timeout) for axis in AXES}
    stage = new_groups(mesh.stages(), timeout) if mesh.pipeline > 1 else None
    return ParallelContext(**axes, mesh=mesh, stage_group=stage)


def new_groups(lines: Sequence[Sequence[int]], timeout: timedelta) -> Any:
    """Make a process group of each line of ranks, on all ranks together; returns that of this rank, or None."""
    groups = [(line, dist.new_group(list(line), timeout=timeout)) for line in lines]
    return next((group for line, group in groups if dist.get_rank() in line), None)


def _axis(mesh: Mesh, axis: str, coordinate: int, timeout: timedelta) -> Axis:
    size, lines = getattr(mesh, axis), mesh.lines(axis)
    if len(lines) == 1:
        return Axis(size, coordinate, dist.group.WORLD)
    if size == 1 and axis != "data":
        return ALONE
    # DeepSpeed wants a group of data ranks also where that is one rank.
    return Axis(size, coordinate, new_groups(lines, timeout))


class ModelParallelUnit:
    """The mesh as DeepSpeed asks for it (its `mpu`, after Megatron-LM): tensor ranks are its model-parallel ones."""

    def __init__(self, context: ParallelContext) -> None:
        self._data, self._tensor = context.data, context.tensor

    def get_data_parallel_group(self) -> Any:
        """Ranks that hold the same slice of the model."""
        return self._data.group

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._data.size

    def get_model_parallel_group(self) -> Any:
        """Ranks that share one replica's layers."""
        return self._tensor.group

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._tensor.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
