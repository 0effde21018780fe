"""`telar inspect`: finds prepared data by configuration, run or manifest, and tells what it holds. Reads only."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as numbers_from
from pathlib import Path
from typing import Any

from cluster.storage import Storage, absolute_url
from configs.errors import ConfigError, DataError
from configs.load import apply_overrides, load_config, parse_config
from configs.schema import RunConfig
from data.inputs import data_digest
from data.inspect_data import describe, samples
from data.manifest import NAME, Manifest, ShardInfo, folder_of
from data.open_shards import OpenShard
from data.tokenizer import read_tokenizer
from jobs.commands.paths import with_absolute_paths
from jobs.commands.runs import locate, storage_for

COPY_BYTES = 1 << 20
NO_RUN = "a manifest has no run: order and epochs are those of default settings; name CONFIG or RUN, or use --set"


@dataclass(frozen=True)
class Prepared:
    """Prepared data and the configuration that its order comes from; `note` says when parts of that are defaults."""

    storage: Storage
    manifest: Manifest
    config: RunConfig
    note: str = ""


def inspect(
    target: str, storage_option: str | None, overrides: Sequence[str], at: int | None, count: int
) -> dict[str, Any]:
    """Numbers of the prepared data of `target`, or with `at` the `count` samples from that position of the run on.

    Raises ConfigError when `target` is nothing known, DataError when its data is not prepared, or damaged.
    """
    found = _find(target, storage_option, overrides)
    manifest, config = found.manifest, found.config
    result: dict[str, Any] = {
        "storage": found.storage.url,
        "folder": manifest.folder,
        "note": found.note,
        "order": {
            "seed": config.run.seed,
            **{name: getattr(config.data, name) for name in ("lanes", "block_rows", "window_blocks", "bucket_batches")},
        },
    }
    tokenizer = read_tokenizer(found.storage, manifest)
    # Shards on another machine are fetched to a folder that goes again; local ones are read in place.
    with tempfile.TemporaryDirectory(prefix="telar-inspect-") as folder:
        opener = _opener(found.storage.child(manifest.folder), Path(folder))
        if at is None:
            return {**result, **describe(manifest, config, opener, tokenizer)}
        result |= {
            "layout": manifest.layout,
            "source_capacity": manifest.source_capacity,
            "target_capacity": manifest.target_capacity,
            "positions": config.train.steps * config.train.global_batch_sequences,
            "global_batch_sequences": config.train.global_batch_sequences,
        }
        return {**result, "samples": samples(manifest, config, opener, tokenizer, at, count)}


def _opener(inside: Storage, folder: Path) -> OpenShard:
    """Paths of shards on this machine; whoever reads them compares them with their digests."""
    number = numbers_from()
    copies: dict[str, str] = {}

    def path(shard: ShardInfo) -> str:
        local = inside.local_path(shard.path)
        if not inside.exists(shard.path):
            raise DataError(
                f"shard {shard.path}: {inside.url}/{shard.path} does not exist; run the prepare stage again, it makes "
                "what is missing"
            )
        if local is not None:
            return local
        if shard.path not in copies:
            copy = folder / f"{next(number)}.arrow"
            with inside.open(shard.path) as source, copy.open("wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
            copies[shard.path] = str(copy)
        return copies[shard.path]

    return path


def _find(target: str, storage_option: str | None, overrides: Sequence[str]) -> Prepared:
    if target.endswith((".yaml", ".yml")):
        return _of_config(target, storage_option, overrides)
    named = target.rstrip("/")
    folder = absolute_url(named.removesuffix(NAME).rstrip("/") or ".") if named.endswith(NAME) else absolute_url(named)
    data, _, digest = folder.rpartition("/")
    if data.endswith("/data") and Storage(folder).exists(NAME):
        storage = Storage(data.removesuffix("/data"))
        return _of_manifest(storage, Manifest.read(storage, folder_of(digest)), overrides)
    if overrides:
        raise ConfigError("--set: the configuration of a run is fixed; leave --set out, or inspect a CONFIG file")
    place = locate(folder if named.endswith(NAME) else target, storage_option)
    try:
        prepared = json.loads(place.storage.read_text(f"{place.name}/{NAME}"))["data"]
    except FileNotFoundError as error:
        raise DataError(
            f"RUN: run {place.name} has no prepared data yet; its job's first stage prepares it, as does "
            f"`telar submit --resume {shlex.quote(target)} --stage prepare`"
        ) from error
    return Prepared(place.storage, Manifest.read(place.storage, prepared), place.config())


def _of_config(file: str, storage_option: str | None, overrides: Sequence[str]) -> Prepared:
    config = load_config(file, overrides)
    storage = storage_for(storage_option, config)
    folder = folder_of(data_digest(with_absolute_paths(config, file, check=True)))
    if not storage.exists(f"{folder}/{NAME}"):
        command = ["telar", "prepare", file, *(word for each in overrides for word in ("--set", each))]
        if storage_option:
            command += ["--storage", storage_option]
        raise DataError(
            f"CONFIG: the data of {file}, as its files are now, is not prepared in {storage.url} ({folder} is not "
            f"there); prepare it with `{shlex.join(command)}`"
        )
    return Prepared(storage, Manifest.read(storage, folder), config)


def _of_manifest(storage: Storage, manifest: Manifest, overrides: Sequence[str]) -> Prepared:
    """A manifest knows corpora and weights; all else is as in a configuration that sets nothing but `overrides`."""
    corpora = [
        {"name": corpus.name, "kind": "text", "path": storage.url, "source": "{path}", "target": "{text}"}
        for corpus in manifest.corpora
    ]
    data = {"corpora": corpora, "layout": manifest.layout, "packing": manifest.packing}
    train = {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1}
    tree = apply_overrides({"data": data, "train": train}, overrides)
    config = parse_config(tree, f"{storage.url}/{manifest.folder}/{NAME}")
    return Prepared(storage, manifest, config, NO_RUN)
