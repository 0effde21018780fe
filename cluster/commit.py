"""The commit protocol of checkpoints: a step is valid only through its COMMIT object. No rename, no pointer file.

Layout below a run's `checkpoints/` folder:

    step-00000400/attempt-002/rank-00000.safetensors   fragments, written by each rank
    step-00000400/attempt-002/MANIFEST.json            sizes and digests of all rank files, topology, cursor, versions
    step-00000400/COMMIT                               {"attempt", "digest": xxh3-128 of MANIFEST.json}

COMMIT is created if absent, after every rank file of one attempt was checked; so one attempt commits a step, and an
attempt that was cut off can still write below its own folder but never replace what was committed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import xxhash

from cluster.storage import Storage
from configs.errors import StorageError

STEP = re.compile(r"step-(\d{8,12})")
FORMAT_VERSION = 1
# Larger ones are nothing that Telar wrote, and are not read into memory. A manifest takes some 200 bytes per rank.
MOST_COMMIT_BYTES, MOST_MANIFEST_BYTES = 4096, 64 * 2**20


class CheckpointError(StorageError):
    """A checkpoint is absent, uncommitted, or not what its digests say."""


class DamagedCheckpoint(CheckpointError):
    """A file of a committed step is gone or does not match its digest."""


@dataclass(frozen=True)
class RankFile:
    """One rank's file as the rank reported it: path relative to the attempt's folder, bytes, xxh3-128 hex."""

    rank: int
    path: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Committed:
    """A committed step whose MANIFEST matches the digest in COMMIT."""

    step: int
    attempt: int
    folder: str
    manifest: dict
    digest: str


def step_folder(step: int) -> str:
    """Folder of a step, zero-padded so that names sort by step."""
    return f"step-{step:08d}"


def attempt_folder(step: int, attempt: int) -> str:
    """Folder that only this attempt writes for this step."""
    return f"{step_folder(step)}/attempt-{attempt:03d}"


def rank_file_name(rank: int) -> str:
    """File name of one rank's fragments."""
    return f"rank-{rank:05d}.safetensors"


def commit(
    checkpoints: Storage, step: int, attempt: int, files: list[RankFile], world_size: int, extra: dict
) -> Committed:
    """Check that all ranks' files lie in storage as reported, write MANIFEST.json, then create COMMIT.

    `extra` (JSON values: topology, data cursor, configuration digest, versions) goes into the manifest. Raises
    CheckpointError, leaving the step uncommitted, when a rank is missing, a size differs or another attempt has
    committed this step.
    """
    ranks = sorted(file.rank for file in files)
    if ranks != list(range(world_size)):
        raise CheckpointError(f"step {step}: files of ranks {ranks} reported, {world_size} ranks expected")
    folder = attempt_folder(step, attempt)
    for file in files:
        found = checkpoints.size(f"{folder}/{file.path}")
        if found != file.bytes:
            raise CheckpointError(
                f"{folder}/{file.path}: {found} bytes in storage, rank {file.rank} wrote {file.bytes}"
            )
    manifest = {
        "format": FORMAT_VERSION,
        "step": step,
        "attempt": attempt,
        "world_size": world_size,
        "files": [vars(file) for file in sorted(files, key=lambda file: file.rank)],
        **extra,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    checkpoints.write_bytes(f"{folder}/MANIFEST.json", text)
    digest = xxhash.xxh3_128_hexdigest(text)
    marker = {"attempt": attempt, "digest": digest}
    if checkpoints.exists(f"{step_folder(step)}/COMMIT") and not _is_valid(checkpoints, step):
        # A damaged COMMIT says nothing; it must not keep the step from being committed anew. An absent one is left to
        # `create` alone: removing here could take away what another attempt commits at this very moment.
        withdraw(checkpoints, step)
    if not checkpoints.create(f"{step_folder(step)}/COMMIT", json.dumps(marker).encode()):
        raise CheckpointError(f"step {step} was committed by another attempt; this one's files are not used")
    return Committed(step, attempt, folder, manifest, digest)


def _is_valid(checkpoints: Storage, step: int) -> bool:
    try:
        read_commit(checkpoints, step)
    except CheckpointError:
        return False
    return True


def withdraw(checkpoints: Storage, step: int) -> None:
    """Take back a commit whose rank files turned out to be damaged; the files stay until they are pruned."""
    checkpoints.remove(f"{step_folder(step)}/COMMIT")


def read_commit(checkpoints: Storage, step: int) -> Committed:
    """The committed state of a step; raises CheckpointError when it is not committed or does not match its digest."""
    name = f"{step_folder(step)}/COMMIT"
    try:
        marker = json.loads(_read(checkpoints, name, MOST_COMMIT_BYTES))
        attempt, digest = int(marker["attempt"]), str(marker["digest"])
        folder = attempt_folder(step, attempt)
        text = _read(checkpoints, f"{folder}/MANIFEST.json", MOST_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoints.url}/{step_folder(step)}: not committed ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoints.url}/{name}: damaged ({error})") from error
    if xxhash.xxh3_128_hexdigest(text) != digest:
        raise CheckpointError(f"{checkpoints.url}/{folder}/MANIFEST.json: content does not match the digest in COMMIT")
    try:
        manifest = json.loads(text)
        if not isinstance(manifest, dict):
            raise TypeError("no mapping")
        if manifest.get("format") == FORMAT_VERSION:
            _check_files(manifest["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoints.url}/{folder}/MANIFEST.json: is no manifest ({error})") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoints.url}/{folder}/MANIFEST.json: format {manifest.get('format')}, this version reads "
            f"{FORMAT_VERSION}"
        )
    return Committed(step, attempt, folder, manifest, digest)


def _read(checkpoints: Storage, path: str, most_bytes: int) -> bytes:
    """Content of an object of a plausible size: not of one that fills the memory, nor of a pipe that never ends."""
    size = checkpoints.size(path)
    if not 0 < size <= most_bytes:
        raise CheckpointError(f"{checkpoints.url}/{path}: {size} bytes; it has 1 to {most_bytes}, so it is damaged")
    return checkpoints.read_bytes(path)


def _check_files(entries: object) -> None:
    """Raise ValueError or TypeError unless these are records of rank files with the names that ranks give them.

    So no name that a manifest holds leads anywhere else.
    """
    if not isinstance(entries, list):
        raise TypeError("files: no list")
    for entry in entries:
        file = RankFile(**entry)
        if not all(type(number) is int and number >= 0 for number in (file.rank, file.bytes)):
            raise ValueError(f"files: {entry} has no natural numbers for rank and bytes")
        if file.path != rank_file_name(file.rank):
            raise ValueError(f"files: rank {file.rank} cannot have a file {file.path!r}")


def committed_steps(checkpoints: Storage) -> list[int]:
    """Steps that have a COMMIT object, ascending; whether they are valid shows when they are read."""
    steps = []
    for name in checkpoints.names():
        match = STEP.fullmatch(name)
        if match and checkpoints.exists(f"{name}/COMMIT"):
            steps.append(int(match[1]))
    return sorted(steps)


def latest(checkpoints: Storage) -> tuple[Committed | None, list[str]]:
    """The highest valid committed step, and a message for each committed step that was passed over as damaged."""
    passed_over = []
    for step in reversed(committed_steps(checkpoints)):
        try:
            return read_commit(checkpoints, step), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def prune(checkpoints: Storage, keep: int, keep_every: int | None = None) -> list[int]:
    """Remove all but the newest `keep` valid steps and multiples of `keep_every`, COMMIT first: no half-removed step
    looks valid.

    Folders of uncommitted steps below the newest valid commit go too. Returns the steps removed.
    """
    committed = [step for step in committed_steps(checkpoints) if _is_valid(checkpoints, step)]
    if not committed:
        return []
    kept = {*committed[-keep:], *(step for step in committed if keep_every and step % keep_every == 0)}
    removed = []
    for name in checkpoints.names():
        match = STEP.fullmatch(name)
        if match and int(match[1]) not in kept and int(match[1]) < committed[-1]:
            checkpoints.remove(f"{name}/COMMIT")
            checkpoints.remove(name)
            removed.append(int(match[1]))
    return removed
