"""What prepared data holds, in numbers and in words: corpora, mixture, lengths, and the samples at any position.

Costs nothing that grows with the data: totals stand in the manifest, lengths are counted in a bounded number of rows,
and a position is found by computing it. All results can be JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from configs.schema import RunConfig
from data.manifest import CorpusInfo, Manifest
from data.mixture import make_schedule
from data.open_shards import OpenShard
from data.reader import SampleReader
from data.schedule import quotas
from data.shards import SOURCE_LENGTHS, TARGET_LENGTHS, ShardReader
from data.tokenizer import Tokenizer, counted

# Lengths are counted in at most so many rows of at most so many shards of a corpus, both at equal distances.
MEASURED_SHARDS = 16
MEASURED_ROWS = 32_768
# Of a run of special tokens so many are spelled at either end.
SPELLED_SPECIALS = 4


def describe(manifest: Manifest, config: RunConfig, open_shard: OpenShard, tokenizer: Tokenizer) -> dict[str, Any]:
    """Shards, rows, tokens, fill, mixture, lengths and counts of each corpus, and what the tokenizer is.

    A corpus's `epochs` are how often the positions of `train.steps` go through it, by its exact quota. Raises DataError
    for a shard that is missing or damaged, ConfigError for weights that no mixture can have.
    """
    return {
        "folder": manifest.folder,
        "digest": manifest.digest,
        "layout": manifest.layout,
        "packing": manifest.packing,
        "source_capacity": manifest.source_capacity,
        "target_capacity": manifest.target_capacity,
        "positions": config.train.steps * config.train.global_batch_sequences,
        "tokenizer": _tokenizer_facts(manifest, tokenizer),
        "mixture": _mixture(manifest, config),
        "corpora": [_corpus(manifest, corpus, open_shard) for corpus in manifest.corpora],
    }


def _corpus(manifest: Manifest, corpus: CorpusInfo, open_shard: OpenShard) -> dict[str, Any]:
    room = corpus.rows * manifest.target_capacity
    labels = corpus.target_tokens
    in_sequence = manifest.layout == "sequence"
    return {
        "name": corpus.name,
        "task": corpus.task,
        "shards": len(corpus.shards),
        "rows": corpus.rows,
        "pairs": corpus.pairs,
        "records_held_out": corpus.held_out.rows,
        "source_tokens": corpus.source_tokens,
        "target_tokens": labels,
        "source_fill": None if in_sequence else corpus.source_tokens / (corpus.rows * manifest.source_capacity),
        "target_fill": (labels + corpus.source_tokens if in_sequence else labels) / room,
        "counts": dict(corpus.counts),
        "lengths": _lengths(corpus, open_shard),
    }


def _lengths(corpus: CorpusInfo, open_shard: OpenShard) -> dict[str, Any]:
    """How many of the pairs looked at have a source and a target of `least` to `most` tokens."""
    chosen = _spread(len(corpus.shards), MEASURED_SHARDS)
    sides: list[list[np.ndarray]] = [[], []]
    rows_read = 0
    for number in chosen:
        shard = corpus.shards[number]
        reader = ShardReader(open_shard(shard), shard)
        rows = np.array(_spread(shard.rows, MEASURED_ROWS // len(chosen)))
        rows_read += len(rows)
        # Lengths alone: that the tokens beside them are whole is checked where tokens are read.
        starts, ends = reader.spans(rows, tokens_follow=False)
        for side, column in zip(sides, (SOURCE_LENGTHS, TARGET_LENGTHS), strict=True):
            parts = zip(starts[column].tolist(), ends[column].tolist(), strict=True)
            side.append(np.concatenate([reader.numbers[start:end] for start, end in parts]))
        reader.close()
    source, target = (np.concatenate(side) for side in sides)
    # Bin 0 holds length 0, bin b from 2^(b-1) to 2^b - 1: frexp gives the number of bits.
    longest = int(max(source.max(), target.max()))
    width = longest.bit_length() + 1
    counted = [np.bincount(np.frexp(side)[1], minlength=width).tolist() for side in (source, target)]
    return {
        "shards": len(chosen),
        "rows": rows_read,
        "pairs": len(source),
        "bins": [
            {
                "least": 2**b // 2,
                "most": min(2**b - 1, longest),
                "source": counted[0][b],
                "target": counted[1][b],
            }
            for b in range(width)
        ],
        "source": _quantiles(source),
        "target": _quantiles(target),
    }


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    found = np.quantile(lengths, (0, 0.5, 0.9, 1), method="nearest").astype(int).tolist()
    return dict(zip(("least", "median", "nine_in_ten", "most"), found, strict=True))


def _spread(count: int, most: int) -> list[int]:
    """All of range(count), or `most` of them at equal distances."""
    return np.linspace(0, count - 1, min(count, max(1, most))).round().astype(int).tolist()


def _mixture(manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    """Per corpus the weights asked for, slots of a superblock and epochs, one entry of `segments` per weight change."""
    schedule = make_schedule(manifest, config)
    batch = config.train.global_batch_sequences
    end = config.train.steps * batch
    firsts = [segment.first for segment in schedule.segments]
    drawn = np.zeros(len(manifest.corpora))
    segments = []
    for segment, until in zip(schedule.segments, [*firsts[1:], None], strict=True):
        slots = np.array(quotas(segment.weights))
        last = end if until is None else min(until, end)
        drawn += max(0, last - segment.first) * slots / slots.sum()
        segments.append(
            {
                "first_position": segment.first,
                "from_step": segment.first / batch,
                "superblock": int(slots.sum()) * config.data.lanes,
                "weights": list(segment.weights),
                "slots": slots.tolist(),
                "shares": (slots / slots.sum()).tolist(),
            }
        )
    rows = np.array([corpus.rows for corpus in manifest.corpora])
    return {
        "corpora": [corpus.name for corpus in manifest.corpora],
        "segments": segments,
        "epochs": (drawn / rows).tolist(),
    }


def _tokenizer_facts(manifest: Manifest, tokenizer: Tokenizer) -> dict[str, Any]:
    special = _specials(tokenizer)
    return {
        "kind": json.loads(tokenizer.to_bytes())["model"].get("type", "unknown"),
        "digest": manifest.tokenizer_digest,
        "vocabulary_size": manifest.vocabulary_size,
        "pad_id": manifest.pad_id,
        "bos_id": manifest.bos_id,
        "eos_id": manifest.eos_id,
        "special_tokens": [special[token] for token in sorted(special)],
    }


def _specials(tokenizer: Tokenizer) -> dict[int, str]:
    """Names of tokens that no text becomes by its own letters."""
    return {each["id"]: each["content"] for each in json.loads(tokenizer.to_bytes())["added_tokens"]}


def samples(
    manifest: Manifest, config: RunConfig, open_shard: OpenShard, tokenizer: Tokenizer, at: int, count: int
) -> list[dict[str, Any]]:
    """The samples at positions [at, at + count) of the run: where each lies and the texts of its pairs.

    `order_position` differs from `position` where length buckets move samples. Epochs and rows count from 0.
    `parts` of a side are [text, is special token] one after the other. `ended` is false for a piece of a target that
    another pair continues. A sample of a quarantined shard has no pairs. Raises DataError for damaged shards.
    """
    reader = SampleReader(manifest, config, open_shard)
    places = np.arange(at, at + count)
    in_order = reader.positions(places)
    plan = reader.plan(in_order)
    first_shards = np.cumsum([0, *(len(corpus.shards) for corpus in manifest.corpora)])
    special = _specials(tokenizer)
    columns = (places, in_order, *reader.order(in_order), plan.shards, plan.rows)
    found = []
    for place, position, corpus, epoch, row, number, row_in_shard in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        info = manifest.corpora[corpus]
        source, source_lengths, target, target_lengths = reader.row(number, row_in_shard)
        pairs = zip(_split(source, source_lengths), _split(target, target_lengths), strict=True)
        found.append(
            {
                "position": place,
                "order_position": position,
                "corpus": info.name,
                "epoch": epoch,
                "row": row,
                "shard": info.shards[number - int(first_shards[corpus])].path,
                "row_in_shard": row_in_shard,
                "source_tokens": len(source),
                "target_tokens": len(target),
                "pairs": [
                    {
                        "source": _side(source_ids, tokenizer, special),
                        "target": _side(target_ids, tokenizer, special),
                        "ended": bool(len(target_ids)) and int(target_ids[-1]) == manifest.eos_id,
                    }
                    for source_ids, target_ids in pairs
                ],
            }
        )
    return found


def _split(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _side(ids: np.ndarray, tokenizer: Tokenizer, special: dict[int, str]) -> dict[str, Any]:
    tokens = ids.tolist()
    return {"ids": tokens, "parts": [list(part) for part in text_parts(tokens, tokenizer, special)]}


def text_parts(ids: Sequence[int], tokenizer: Tokenizer, special: dict[int, str]) -> list[tuple[str, bool]]:
    """Decoded text and special tokens in turn: image codes are counted, and so is the middle of other long runs."""
    codes = frozenset(tokenizer.image_codes)
    parts: list[tuple[str, bool]] = []
    for (is_special, is_image), group in groupby(ids, key=lambda token: (token in special, token in codes)):
        run = list(group)
        if is_image:
            parts.append((counted(len(run)), True))
        elif not is_special:
            parts.append((tokenizer.decode(run), False))
        elif len(run) <= 2 * SPELLED_SPECIALS + 1:
            parts.append(("".join(special[token] for token in run), True))
        else:
            ends = (
                "".join(special[token] for token in part) for part in (run[:SPELLED_SPECIALS], run[-SPELLED_SPECIALS:])
            )
            parts.append((f" ... {len(run) - 2 * SPELLED_SPECIALS} more ... ".join(ends), True))
    return parts
