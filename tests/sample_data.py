"""Prepared data made of samples given by a test, and what a loader must make of a sample, token by token."""

import numpy as np

from cluster.storage import Storage
from configs.load import parse_config
from data.manifest import CorpusInfo, Manifest
from data.shards import write_shard

PAD, BOS, FIRST_TOKEN = 0, 1, 3
FIELDS = (
    "source_tokens",
    "source_positions",
    "source_segments",
    "target_tokens",
    "target_positions",
    "target_segments",
    "labels",
    "loss_weight",
)


def numbered(generator, rows, layout, source_capacity, target_capacity, first=FIRST_TOKEN):
    """`rows` samples of random pairs, most full, every token a number of its own from `first` on."""
    samples = []
    for _ in range(rows):
        kind, sample = generator.integers(4), []
        source_left, left = source_capacity, target_capacity
        while left > 0 and (not sample or kind == 3):
            size = left if kind == 0 else int(generator.integers(1, left + 1))
            if layout == "sequence":
                before = 0 if kind == 0 else int(generator.integers(0, size))
                size, left = size - before, left - size
            else:
                before, left = int(generator.integers(0, source_left + 1)), left - size
                source_left -= before
            sample.append((np.arange(first, first + before), np.arange(first + before, first + before + size)))
            first += before + size
        samples.append(sample)
    return samples


def prepare_samples(folder, corpora, layout="pairs", capacities=(12, 16), shard_rows=16, data=None, **train):
    """Shards and manifest of `corpora` (name -> samples) below `folder`; returns configuration, storage, manifest."""
    config = parse_config(
        {
            "run": {"seed": 9},
            "data": {
                "corpora": [{"name": name, "kind": "text", "path": "x", "target": "{text}"} for name in corpora],
                "layout": layout,
                "source_tokens": capacities[0],
                "target_tokens": capacities[1],
                "block_rows": 4,
                "lanes": 3,
                "window_blocks": 2,
                **(data or {}),
            },
            "train": {"steps": 5, "global_batch_sequences": 12, "micro_batch_sequences": 2, **train},
        },
        "test",
    )
    storage = Storage(str(folder))
    inside = storage.child("data/abc")
    infos = []
    for number, (name, samples) in enumerate(corpora.items()):
        shards = [
            write_shard(
                inside,
                f"shards/{name}/{start:05d}.arrow",
                samples[start : start + shard_rows],
                2**31,
                config.data.block_rows,
            )
            for start in range(0, len(samples), shard_rows)
        ]
        pairs = sum(map(len, samples))
        infos.append(CorpusInfo(name, 2.0 - number, "likelihood", pairs, tuple(shards), shards[0], {}))
    manifest = Manifest("abc", "t", 2**31, PAD, BOS, 2, *capacities, tuple(infos), layout=layout).write(storage)
    return config, storage, manifest


def expected_row(sample, layout, capacities, widths=None):
    """The fields of one row of a batch as lists, made token by token."""
    row = {name: [] for name in FIELDS}
    for segment, (source, target) in enumerate(sample, 1):
        source, target = source.tolist(), target.tolist()
        if layout == "sequence":
            labels, weight = source + target, [0.0] * len(source) + [1.0] * len(target)
        else:
            labels, weight = target, [1.0] * len(target)
            row["source_tokens"] += source
            row["source_positions"] += range(len(source))
            row["source_segments"] += [segment] * len(source)
        row["target_tokens"] += [BOS, *labels[:-1]]
        row["target_positions"] += range(len(labels))
        row["target_segments"] += [segment] * len(labels)
        row["labels"] += labels
        row["loss_weight"] += weight
    source_width, target_width = widths or capacities
    for name, values in row.items():
        width = source_width if name.startswith("source") else target_width
        width = 0 if layout == "sequence" and name.startswith("source") else width
        padding = PAD if name.endswith("tokens") or name == "labels" else 0.0 if name == "loss_weight" else 0
        values += [padding] * (width - len(values))
    return row


def rows_in(batch):
    """The fields of each row of a batch, as lists."""
    return [{name: getattr(batch, name)[line].tolist() for name in FIELDS} for line in range(len(batch.labels))]
