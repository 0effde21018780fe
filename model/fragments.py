"""Fragments of training state straight out of DeepSpeed's own maps, and back into them at any rank count and stage.

A fragment is a range of one parameter's flattened float32 state: its master weight, one of Adam's moments or Muon's
momentum; where tensor ranks share the parameter, a range of this rank's flattened slice. Every element of every
parameter is owned by exactly one rank (ZeRO 1, 2 and 3 alike), so the owned fragments of all ranks together are the
whole state, whatever the topology was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cluster.commit import CheckpointError
from model.muon import MOMENTUM, Piece
from model.sliced import Part, full_shape, is_copy, part_of

if TYPE_CHECKING:
    from model.engine import Engine

WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """Elements `start .. start + tensor.numel()` of the flattened parameter `name` of full shape `shape`.

    Where tensor ranks share the parameter, `part` is this rank's slice and `start` counts in the flattened slice.
    `state` is "fp32" (master weight), "exp_avg" or "exp_avg_sq", for Muon's matrices "momentum_buffer" in place of
    these two; `tensor` is a flat view of live state. Of a quantized matrix (model/quantize.py) the states are the kind
    of its integers ("int8-weight", "int8-dynamic", "int4-group") and "scale", each whole.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    part: Part | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.tensor.dtype


class Reader(Protocol):
    """What `restore` reads from: a committed checkpoint, or any other holder of all fragments."""

    @property
    def step(self) -> int:
        """Optimizer steps that the state has behind it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter."""

    def read(self, name: str, state: str, start: int, numel: int, part: Part | None = None) -> Tensor:
        """A range of a flattened parameter's state, or of the slice `part` of it, float32 `[numel]`."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter's local range lies: flat partition, offset in it, elements, offset in this rank's `part`.

    Without a local range `numel` is 0; `partition` is then the one where it would lie.
    """

    name: str
    shape: tuple[int, ...]
    partition: int
    offset: int
    numel: int
    start: int
    part: Part | None


def owned_fragments(engine: Engine) -> list[Fragment]:
    """`fragments` without those that the first tensor rank of this stage, or an earlier stage, has too."""
    counts = engine.context.counts
    copies = {name for name, parameter in engine.module.named_parameters() if is_copy(parameter)}
    return [piece for piece in fragments(engine) if (piece.part is not None or counts) and piece.name not in copies]


def fragments(engine: Engine) -> list[Fragment]:
    """What this rank updates, in the order of the model's parameters. Views: copy them before the next step."""
    optimizer = engine.deepspeed.optimizer
    partitions = _partitions(optimizer)
    for number in range(len(partitions)):
        _moments(optimizer, number, step=0)
    found = []
    for place in _places(engine):
        if not place.numel:
            continue
        flat = partitions[place.partition]
        moments = optimizer.optimizer.state[flat]
        sources = {WEIGHT: flat.data, **{name: moments[name] for name in _moment_names(optimizer, place.partition)}}
        for state, source in sources.items():
            piece = source.narrow(0, place.offset, place.numel)
            found.append(Fragment(place.name, state, place.shape, place.start, piece, place.part))
    return found


def restore(engine: Engine, reader: Reader) -> None:
    """Fill this rank's master weights and moments from global ranges, then the weights that the model computes with.

    Called on all ranks together, between steps. Raises CheckpointError when the checkpoint is of another model.
    """
    _check_shapes(engine, reader.shapes())
    optimizer = engine.deepspeed.optimizer
    for number in range(len(_partitions(optimizer))):
        _moments(optimizer, number, reader.step)
    for piece in fragments(engine):
        piece.tensor.copy_(reader.read(piece.name, piece.state, piece.start, piece.tensor.numel(), piece.part))
    if _stage(engine) == 3:
        for flat, used in zip(_partitions(optimizer), optimizer.fp16_partitioned_groups_flat, strict=True):
            used.data.copy_(flat.data)
        # Small parameters are kept whole on every rank and must not keep their old values.
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    else:
        optimizer.update_lp_params()


def _stage(engine: Engine) -> int:
    return int(engine.deepspeed.zero_optimization_stage())


def _partitions(optimizer: Any) -> list[Tensor]:
    """This rank's flat float32 master weights, one tensor per parameter group (ZeRO-3: per sub-group)."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return getattr(optimizer, attribute)
    raise AssertionError(f"DeepSpeed's {type(optimizer).__name__} keeps its master weights in a place not known here")


def muon_pieces(engine: Engine) -> dict[Tensor, list[Piece]]:
    """What each of this rank's partitions holds of the matrices that Muon orthogonalises."""
    optimizer = engine.deepspeed.optimizer
    partitions = _partitions(optimizer)
    found: dict[Tensor, list[Piece]] = {}
    for place in _places(engine):
        if MOMENTUM in _moment_names(optimizer, place.partition):
            piece = Piece(place.shape, place.offset, place.numel, place.start, place.part)
            found.setdefault(partitions[place.partition], []).append(piece)
    return found


def _moment_names(optimizer: Any, partition: int) -> tuple[str, ...]:
    """States of the optimizer that go with a partition's weights."""
    # ZeRO-3 cuts parameter groups into sub-groups.
    group = getattr(optimizer, "sub_group_to_group_id", {}).get(partition, partition)
    return (MOMENTUM,) if optimizer.optimizer.param_groups[group].get("muon") else MOMENTS


def _moments(optimizer: Any, number: int, step: int) -> None:
    """Give a partition the optimizer's state as on its first step; with `step` > 0 Adam's count is set to it."""
    partition, names = _partitions(optimizer)[number], _moment_names(optimizer, number)
    state = optimizer.optimizer.state[partition]
    if not state:
        if names == MOMENTS:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
        for name in names:
            state[name] = torch.zeros_like(partition.data)
    if step and names == MOMENTS:
        state["step"].fill_(float(step))


def _places(engine: Engine) -> Iterator[_Place]:
    """Every parameter in the model's order, which is the same on all ranks."""
    optimizer = engine.deepspeed.optimizer
    if _stage(engine) < 3:
        trained = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
        group_of = {id(parameter): number for number, group in enumerate(trained) for parameter in group}
    for name, parameter in engine.module.named_parameters():
        shape, part = full_shape(parameter), part_of(parameter)
        if _stage(engine) == 3:
            group, offset, per_rank = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = per_rank * engine.context.data.rank
            numel = max(0, min(per_rank, parameter.ds_numel - start))
            yield _Place(name, shape, group, offset, numel, start if numel else 0, part)
        elif parameter._hp_mapping is None:
            yield _Place(name, shape, group_of[id(parameter)], 0, 0, 0, part)
        else:
            mapping = parameter._hp_mapping
            place, source = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield _Place(name, shape, mapping.param_group_index, place.start, place.numel, source.start, part)


def _check_shapes(engine: Engine, stored: dict[str, tuple[int, ...]]) -> None:
    expected = engine.shapes
    if stored == expected:
        return
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise CheckpointError(
                f"the checkpoint is of another model: {name} is {stored.get(name, 'absent')} in it and "
                f"{expected.get(name, 'absent')} in this configuration; use the model section and the vocabulary that "
                "it was trained with, or start a new run"
            )
