"""Shards of random tokens for tests, and what a reader of theirs must deliver."""

import hashlib
import json
import sys

import numpy as np
import pyarrow as pa

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import CorpusInfo, Manifest
from data.shards import write_shard

ROWS = 10


def fill(storage, shards=5, rows=ROWS, seed=0):
    """Write shards, and the manifest that lists them; returns the manifest, its shards, and the tokens by path."""
    inside, generator = storage.child("data/abc"), np.random.default_rng(seed)
    infos, tokens = [], {}
    for number in range(shards):
        path = f"shards/c/{number:05d}-000.arrow"
        pairs = [[(generator.integers(0, 99, 7), generator.integers(0, 99, 5))] for _ in range(rows)]
        infos.append(write_shard(inside, path, pairs, 100, 4))
        tokens[path] = [[side.tolist() for side in sample[0]] for sample in pairs]
    corpus = CorpusInfo("c", 1.0, "likelihood", shards * rows, tuple(infos), infos[0], {})
    manifest = Manifest("abc", "t", 100, 0, 1, 2, 8, 8, (corpus,))
    return manifest.write(storage), infos, tokens


def read(path):
    """All tokens of a shard file, through a memory map and without the project's reader."""
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    return [list(row) for row in zip(table["source"].to_pylist(), table["target"].to_pylist(), strict=True)]


def delivered(opener, infos, tokens):
    """Open and read all shards; every token must be the one written. Errors of the opener by path."""
    errors = {}
    for info in infos:
        try:
            path = opener(info)
        except DataError as error:
            errors[info.path] = error
            continue
        assert read(path) == tokens[info.path], f"{info.path}: wrong tokens were delivered"
    return errors


def digest(rows):
    """A digest of tokens, to compare between processes."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def main(url, folder, cache, cache_bytes, seconds, hold):
    """Another process: read all shards of the manifest, print digest or error by path; with `hold` keep the leases."""
    from data.opener import plain_opener

    storage = Storage(url)
    manifest = Manifest.read(storage, folder)
    opener = plain_opener(storage, manifest, cache, int(cache_bytes), float(seconds), 1.0)
    found = {}
    for info in manifest.corpora[0].shards:
        try:
            found[info.path] = digest(read(opener(info)))
        except DataError as error:
            found[info.path] = f"{type(error).__name__}: {error}"
    print(json.dumps({"shards": found, "statistics": opener.statistics()}), flush=True)
    if hold == "hold":
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
