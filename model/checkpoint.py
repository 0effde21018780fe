"""Rank files of a checkpoint: written from a snapshot while training goes on, read back verified, by global offsets.

A rank file is a safetensors file. A tensor's key is `parameter|state|start`: a range of that parameter's flattened
state, or of the flattened slice of it that the rank's metadata names (`parts`: dimension, start, stop). The metadata
holds the full shape of each parameter that has a range in the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.commit import CheckpointError, Committed, DamagedCheckpoint, RankFile, attempt_folder, rank_file_name
from cluster.storage import Storage
from model.engine import Engine
from model.fragments import WEIGHT, Fragment, owned_fragments
from model.sliced import Block, Part, block_of, common, pieces, view

BLOCK_BYTES = 4 * 2**20
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def snapshot(engine: Engine) -> list[Fragment]:
    """The fragments that this rank owns copied to host memory: training may go on while they are written."""
    return [replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in owned_fragments(engine)]


def write_snapshot(
    checkpoints: Storage,
    step: int,
    attempt: int,
    rank: int,
    owned: Sequence[Fragment],
    extra: dict[str, str] | None = None,
    moved: Callable[[int], None] = lambda count: None,
) -> RankFile:
    """Stream a snapshot into this rank's file below the attempt's folder; returns its record for `cluster.commit`.

    `extra` goes into the file's metadata; `moved` hears of bytes that the store took. Uncommitted until the controller
    commits; raises StorageError.
    """
    name = rank_file_name(rank)
    digest, size = xxhash.xxh3_128(), 0
    with checkpoints.open(f"{attempt_folder(step, attempt)}/{name}", "wb") as file:
        for block in serialized(owned, {"step": str(step), **(extra or {})}):
            file.write(block)
            digest.update(block)
            size += len(block)
            moved(len(block))
    return RankFile(rank, name, size, digest.hexdigest())


def write_rank(
    checkpoints: Storage, step: int, attempt: int, rank: int, engine: Engine, extra: dict[str, str] | None = None
) -> RankFile:
    """`snapshot` and `write_snapshot` in one go."""
    return write_snapshot(checkpoints, step, attempt, rank, snapshot(engine), extra)


def file_bytes(owned: Sequence[Fragment]) -> int:
    """Bytes of the file that `write_snapshot` would write without metadata of its own."""
    return sum(len(block) for block in serialized(owned, {}))


def serialized(owned: Sequence[Fragment], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The safetensors format (length, JSON header, raw little-endian tensors), without a second copy in memory."""
    text = _header(owned, metadata)
    yield len(text).to_bytes(8, "little")
    yield text
    for piece in owned:
        yield memoryview(piece.tensor.contiguous().view(torch.uint8).numpy())


def snapshot_bytes(engine: Engine, metadata: dict[str, str], room: np.ndarray | None = None) -> np.ndarray:
    """What a rank file of the state now would hold, uint8 `[bytes]`, by one copy of each tensor.

    Fills `room`, what an earlier call has returned, where that is of the same size.
    """
    owned = owned_fragments(engine)
    text = _header(owned, metadata)
    begin = 8 + len(text)
    size = begin + sum(piece.tensor.numel() * piece.tensor.element_size() for piece in owned)
    if room is None or len(room) != size:
        room = np.empty(size, np.uint8)
    room[:begin] = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    target = torch.from_numpy(room)
    for piece in owned:
        source = piece.tensor.detach().contiguous().view(torch.uint8)
        target[begin : begin + len(source)].copy_(source)
        begin += len(source)
    return room


def _header(owned: Sequence[Fragment], metadata: dict[str, str]) -> bytes:
    """The JSON of a rank file: metadata, full shapes, and where each tensor lies."""
    shapes = {piece.name: piece.shape for piece in owned}
    parts = {piece.name: piece.part for piece in owned if piece.part is not None}
    own = {"shapes": json.dumps(shapes), **({"parts": json.dumps(parts)} if parts else {})}
    header: dict[str, Any] = {"__metadata__": {**metadata, **own}}
    end = 0
    for piece in owned:
        begin, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
        header[f"{piece.name}|{piece.state}|{piece.start}"] = {
            "dtype": DTYPES[piece.dtype],
            "shape": [piece.tensor.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


class _Range(NamedTuple):
    """Elements `start .. start + numel` of the flattened `block`, stored under `key`."""

    start: int
    numel: int
    file: int
    key: str
    block: Block


class CheckpointReader:
    """A committed checkpoint; every rank file is checked against its digest before any of its bytes is used.

    Files in remote storage are kept in a temporary folder until `close` (or the end of a `with` block).
    """

    def __init__(self, checkpoints: Storage, committed: Committed) -> None:
        """Raises CheckpointError naming the file that is absent, of another size or of another content."""
        self.committed = committed
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._files: list[Any] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[tuple[str, str], list[_Range]] = {}
        try:
            for record in committed.manifest["files"]:
                file = RankFile(**record)
                path = self._verified(checkpoints, file)
                try:
                    self._add(path)
                except (SafetensorError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
                    raise DamagedCheckpoint(
                        f"{checkpoints.url}/{committed.folder}/{file.path}: is no file of fragments ({error})"
                    ) from error
        except BaseException:
            self.close()
            raise
        for ranges in self._ranges.values():
            ranges.sort()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    @property
    def step(self) -> int:
        """Optimizer steps behind this state."""
        return self.committed.step

    def names(self) -> list[str]:
        """Names of all parameters, sorted."""
        return sorted(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter."""
        return dict(self._shapes)

    def states(self) -> dict[str, set[str]]:
        """The states that are stored of every parameter."""
        found: dict[str, set[str]] = {name: set() for name in self._shapes}
        for name, state in self._ranges:
            found[name].add(state)
        return found

    def check_complete(self) -> None:
        """Raise CheckpointError naming a parameter of whose state there is less than the parameter's shape asks for.

        Packed matrices are in forms of their own and are not counted.
        """
        for (name, state), ranges in self._ranges.items():
            size, held = torch.Size(self._shapes[name]).numel(), sum(stored.numel for stored in ranges)
            if (name, WEIGHT) in self._ranges and held != size:
                raise CheckpointError(
                    f"{self.committed.folder}: {state} of {name!r} holds {held} of {size} elements; the checkpoint is "
                    "incomplete"
                )

    def stored(self, name: str, state: str) -> Tensor:
        """A whole flat state in the type that it was written in, for states that one fragment holds.

        Raises CheckpointError when it is absent or in several pieces.
        """
        pieces = self._ranges.get((name, state), [])
        if len(pieces) != 1 or pieces[0].start:
            raise CheckpointError(f"{self.committed.folder}: {state} of {name!r} is in {len(pieces)} pieces, not one")
        return self._files[pieces[0].file].get_tensor(pieces[0].key)

    def read(self, name: str, state: str, start: int, numel: int, part: Part | None = None) -> Tensor:
        """Elements `start .. start + numel` of a flattened parameter's state, or of its `part`, float32 `[numel]`.

        Raises CheckpointError when the checkpoint does not hold all of them.
        """
        if name in self._shapes and (name, state) not in self._ranges:
            if (name, WEIGHT) not in self._ranges:
                raise CheckpointError(
                    f"{self.committed.folder}: {name!r} is quantized, it cannot be trained on; train the run that was "
                    "compressed"
                )
            raise CheckpointError(
                f"{self.committed.folder}: no {state} of {name!r}; it was trained with another optimizer.name: "
                "set that one, or start a new run"
            )
        ranges = self._ranges.get((name, state), ())
        held_elements = sum(stored.numel for stored in ranges)
        if held_elements < numel:
            # Said before memory is taken: the shape is what the file claims.
            raise CheckpointError(
                f"{self.committed.folder}: {state} of {name!r} holds {held_elements} elements, {numel} are needed; the "
                "checkpoint is incomplete"
            )
        result, filled = torch.empty(numel, dtype=torch.float32), 0
        wanted = list(pieces(block_of(self._shapes[name], part), start, numel)) if ranges else []
        for stored in ranges:
            file = self._files[stored.file]
            for held, offset in pieces(stored.block, stored.start, stored.numel):
                for block, at in wanted:
                    both = common(held, block)
                    if both is not None:
                        view(result, at, block, both).copy_(_read(file, stored.key, offset, held, both))
                        filled += both.size
        if filled != numel:
            raise CheckpointError(
                f"{self.committed.folder}: {state} of {name!r} holds {filled} of the elements "
                f"{start}..{start + numel}; the checkpoint is incomplete"
            )
        return result

    def _verified(self, checkpoints: Storage, record: RankFile) -> str:
        """A local path whose content has the recorded digest."""
        path = f"{self.committed.folder}/{record.path}"
        local, digest, size = checkpoints.local_path(path), xxhash.xxh3_128(), 0
        try:
            # Before a byte is read: another file may be huge, or a pipe that never ends (of size 0).
            present = checkpoints.size(path)
            if present != record.bytes or not present:
                raise DamagedCheckpoint(
                    f"{checkpoints.url}/{path}: {present} bytes, its manifest says {record.bytes}; the file is "
                    "damaged, use another checkpoint"
                )
            with (
                _copy_target(self._copy_path(record) if local is None else None) as copy,
                checkpoints.open(path) as file,
            ):
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    if copy is not None:
                        copy.write(block)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{checkpoints.url}/{path}: absent; the checkpoint cannot be used") from error
        if size != record.bytes or digest.hexdigest() != record.digest:
            raise DamagedCheckpoint(
                f"{checkpoints.url}/{path}: {size} bytes with digest {digest.hexdigest()}, its manifest says "
                f"{record.bytes} bytes and {record.digest}; the file is damaged, use another checkpoint"
            )
        return local or str(self._copy_path(record))

    def _copy_path(self, record: RankFile) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="telar-checkpoint-")
        return Path(self._temporary.name) / record.path

    def _add(self, path: str) -> None:
        file = safe_open(path, framework="pt")
        number = len(self._files)
        self._files.append(file)
        metadata = file.metadata() or {}
        for name, shape in json.loads(metadata["shapes"]).items():
            self._shapes[name] = _natural(shape)
        parts = {name: Part(*_natural(part)) for name, part in json.loads(metadata.get("parts", "{}")).items()}
        for key in file.keys():  # noqa: SIM118  (not a dict)
            name, state, start = key.split("|")
            ranges = self._ranges.setdefault((name, state), [])
            block = block_of(self._shapes[name], parts.get(name))
            ranges.append(_Range(int(start), file.get_slice(key).get_shape()[0], number, key, block))


def _natural(numbers: Any) -> tuple[int, ...]:
    """Sizes or places as a file gives them; raises ValueError for anything but natural numbers."""
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{str(numbers)[:100]} are no natural numbers")
    return tuple(numbers)


def _read(file: Any, key: str, offset: int, held: Block, wanted: Block) -> Tensor:
    """`wanted [rows, columns]` of the stored tensor that has the block `held` from `offset` on."""
    first, rows = offset + (wanted.top - held.top) * held.width, wanted.bottom - wanted.top
    stored = file.get_slice(key)[first : first + rows * held.width]
    return stored.view(rows, held.width)[:, wanted.left - held.left : wanted.right - held.left]


@contextmanager
def _copy_target(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield None
        return
    with path.open("wb") as file:
        yield file


def load_parameters(reader: CheckpointReader) -> dict[str, Tensor]:
    """The master weight by name of every parameter that has one, float32 in its full shape; all but packed ones."""
    return load_state(reader, WEIGHT)


def load_state(reader: CheckpointReader, state: str) -> dict[str, Tensor]:
    """One state by name of every parameter that has it, float32 in the parameter's full shape."""
    states = reader.states()
    return {
        name: reader.read(name, state, 0, torch.Size(shape).numel()).reshape(shape)
        for name, shape in reader.shapes().items()
        if state in states[name]
    }
