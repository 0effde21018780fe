"""Where a run stands in its data, as JSON of less than a kilobyte, and whether it may go on from there.

The order is a pure function, so a state is what the function depends on and one position.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from configs.errors import ConfigError, DataError
from configs.schema import RunConfig
from data.manifest import Manifest

# A path of a shard is 40 characters or so.
QUARANTINED_NAMED = 8
QUARANTINED_CHARACTERS = 480


def make_state(
    manifest: Manifest, config: RunConfig, samples_consumed: int, quarantined: Sequence[str]
) -> dict[str, Any]:
    """`data_digest`, `seed`, `schedule`, `samples_consumed` (by all replicas) and `quarantined`.

    `schedule` is a digest of all else that the order of the samples consumed so far depends on; `quarantined` are the
    first paths of shards whose samples this rank masked, at most 8 and 480 characters, for people to read.
    """
    named = [*quarantined[:QUARANTINED_NAMED]]
    while sum(map(len, named)) > QUARANTINED_CHARACTERS:
        named.pop()
    return {
        "data_digest": manifest.digest,
        "seed": config.run.seed,
        "schedule": schedule_digest(manifest, config, samples_consumed),
        "samples_consumed": samples_consumed,
        "quarantined": named,
    }


def check_state(state: dict[str, Any], manifest: Manifest, config: RunConfig) -> None:
    """Raise when a run of `manifest` and `config` cannot go on from `state` without losing or repeating samples.

    DataError: the state is of other data. ConfigError: of another seed, mixture or order, or no whole step.
    """
    consumed, batch = state["samples_consumed"], config.train.global_batch_sequences
    if state["data_digest"] != manifest.digest:
        raise DataError(
            f"state of the data: it was taken with data {state['data_digest']}, this run has {manifest.digest}; resume "
            "with the corpora, tokenizer and data section of the run that it belongs to"
        )
    if state["seed"] != config.run.seed:
        raise ConfigError(
            f"run.seed: the state of the data was taken with seed {state['seed']}, this run has {config.run.seed}; "
            f"set run.seed to {state['seed']}"
        )
    if consumed % batch:
        raise ConfigError(
            f"train.global_batch_sequences: the state was taken after {consumed} samples, no whole number of batches "
            f"of {batch}; set it to the value of the run that the state belongs to"
        )
    expected = schedule_digest(manifest, config, consumed)
    if state["schedule"] != expected:
        raise ConfigError(
            f"data.corpora.weight: the order of the first {consumed} samples was {state['schedule']} where the state "
            f"was taken and is {expected} here; set the weights, data.weight_changes up to step {consumed // batch}, "
            "data.lanes, data.block_rows, data.window_blocks and data.bucket_batches as they were"
        )


def schedule_digest(manifest: Manifest, config: RunConfig, samples: int) -> str:
    """xxh3-64, hex, of what the order of the first `samples` samples depends on besides data and seed.

    Weight changes that come later are left out, so that they may be appended; micro-batch and global batch count with
    length buckets only, where they decide who stands where.
    """
    data, train = config.data, config.train
    changes = [
        [change.from_step, sorted(change.weights.items())]
        for change in data.weight_changes
        if change.from_step * train.global_batch_sequences < samples
    ]
    if changes:
        changes.append(train.global_batch_sequences)
    body = {
        "weights": [[corpus.name, corpus.weight] for corpus in manifest.corpora],
        "changes": changes,
        "lanes": data.lanes,
        "block_rows": data.block_rows,
        "window_blocks": data.window_blocks,
    }
    if data.bucket_batches:
        body["buckets"] = [data.bucket_batches, train.global_batch_sequences, train.micro_batch_sequences]
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())
