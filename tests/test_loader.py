"""Serving samples: what a batch holds, any replica count sees the same global batch, errors and closing."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from cluster.storage import Storage
from configs.errors import ConfigError, DataError
from configs.load import parse_config
from data.batches import collate
from data.loader import Loader, consumed_pairs, consumed_targets
from data.order import Order
from data.prepare import prepare
from data.reader import SampleReader
from data.runners import serial
from data.shard_server import plain_opener
from data.shards import ShardReader, gather
from data.tokenizer import Tokenizer

FIELDS = ("source_tokens", "source_positions", "source_segments", "target_tokens", "target_positions")
ARRAYS = (*FIELDS, "target_segments", "labels", "loss_weight")
TYPES = {name: np.int32 for name in ARRAYS if name.endswith(("positions", "segments"))} | {"loss_weight": np.float32}
GLOBAL, MICRO = 12, 2


def make_config(folder, **train):
    corpora = [
        {"name": "long", "kind": "text", "path": str(folder / "long"), "source": "", "target": "{text}"},
        {"name": "short", "kind": "jsonl", "path": str(folder / "s.jsonl"), "source": "{q}", "target": "{a}"},
    ]
    corpora[0].update(continuation=True, weight=2.0)
    tree = {
        "run": {"seed": 9},
        "data": {
            "corpora": corpora,
            "tokenizer": {"vocabulary_size": 320},
            "source_tokens": 40,
            "target_tokens": 20,
            "held_out_fraction": 0.1,
            "shard_rows": 16,
            "block_rows": 4,
            "lanes": 3,
            "window_blocks": 2,
        },
        "train": {"steps": 5, "global_batch_sequences": GLOBAL, "micro_batch_sequences": MICRO, **train},
    }
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    (folder / "long").mkdir()
    for number in range(6):
        text = "\n\n".join(f"Line {i} of text {number} goes on about {i * number}." for i in range(40))
        (folder / "long" / f"{number}.txt").write_text(text)
    lines = [f'{{"q": "double of {i}", "a": "it is {2 * i}"}}' for i in range(120)]
    (folder / "s.jsonl").write_text("\n".join(lines))
    config, storage = make_config(folder), Storage(str(folder / "store"))
    return folder, config, storage, prepare(config, storage, serial, lambda line: None)


def steps_of(prepared, replica, replicas, start, count):
    _, config, storage, manifest = prepared
    loader = Loader(manifest, config, plain_opener(storage, manifest), replica, replicas, start)
    try:
        return [[copied(batch) for batch in loader.next_step()] for _ in range(count)]
    finally:
        loader.close()


def copied(batch):
    """The batch in memory of its own: the loader's is written over two steps later."""
    return replace(batch, **{name: getattr(batch, name).copy() for name in ARRAYS})


def assert_same(one, other):
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def slow_rows(prepared, positions):
    """Rows at positions, found by counting through the shards of the manifest one by one."""
    _, config, storage, manifest = prepared
    data = config.data
    order = Order(
        [corpus.rows for corpus in manifest.corpora], [2.0, 1.0], 9, data.lanes, data.block_rows, data.window_blocks
    )
    for corpus, _, row in zip(*order(positions), strict=True):
        for shard in manifest.corpora[corpus].shards:
            if row < shard.rows:
                path = storage.local_path(f"{manifest.folder}/{shard.path}")
                yield ShardReader(path, shard).row(int(row))
                break
            row -= shard.rows


def test_batches_equal_a_loop_over_tokens(prepared):
    _, config, _, manifest = prepared
    for step, batches in enumerate(steps_of(prepared, 0, 1, 0, 3)):
        assert [batch.index for batch in batches] == list(range(GLOBAL // MICRO))
        for batch in batches:
            first = step * GLOBAL + batch.index * MICRO
            for line, row in enumerate(slow_rows(prepared, np.arange(first, first + MICRO))):
                expected = {name: [] for name in ARRAYS}
                source, source_lengths, labels, target_lengths = (part.tolist() for part in row)
                for segment, (s, t) in enumerate(zip(source_lengths, target_lengths, strict=True), 1):
                    own, source = source[:s], source[s:]
                    target, labels = labels[:t], labels[t:]
                    expected["source_tokens"] += own
                    expected["source_positions"] += range(s)
                    expected["source_segments"] += [segment] * s
                    expected["target_tokens"] += [manifest.bos_id, *target[:-1]]
                    expected["target_positions"] += range(t)
                    expected["target_segments"] += [segment] * t
                    expected["labels"] += target
                    expected["loss_weight"] += [1.0] * t
                for name in ARRAYS:
                    array = getattr(batch, name)
                    width = config.data.source_tokens if name.startswith("source") else config.data.target_tokens
                    assert array.shape == (MICRO, width)
                    assert array.dtype == TYPES.get(name, np.int64)
                    values = expected[name]
                    padding = manifest.pad_id if name.endswith("tokens") or name == "labels" else 0
                    assert array[line].tolist() == values + [padding] * (width - len(values)), name


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 5, 7])
def test_any_replica_count_sees_the_same_global_batch(prepared, replicas):
    alone = steps_of(prepared, 0, 1, 1, 3)
    shared = [steps_of(prepared, replica, replicas, 1, 3) for replica in range(replicas)]
    real = GLOBAL // MICRO
    for step in range(3):
        assert len({len(steps[step]) for steps in shared}) == 1
        found = {batch.index: batch for steps in shared for batch in steps[step]}
        assert sorted(found) == list(range(len(shared[0][step]) * replicas))
        for index in range(real):
            assert_same(found[index], alone[step][index])
        for index in range(real, len(found)):
            assert found[index].loss_weight.sum() == 0 and found[index].target_segments.any()


def test_starting_in_the_middle_equals_going_there(prepared):
    from_start, from_three = steps_of(prepared, 1, 2, 0, 5), steps_of(prepared, 1, 2, 3, 2)
    for one, other in zip(from_start[3:], from_three, strict=True):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)


def test_an_epoch_serves_every_sample_once(prepared):
    _, config, storage, manifest = prepared
    reader = SampleReader(manifest, config, plain_opener(storage, manifest))
    rows = manifest.corpora[1].rows
    positions = np.arange(30 * rows)
    corpus, epoch, _ = reader.order(positions)
    chosen = positions[(corpus == 1) & (epoch == 0)]
    samples = reader.read(chosen)
    assert len(chosen) == rows and len(samples.target_lengths) == manifest.corpora[1].pairs
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    answers = [tokenizer.decode(part) for part in np.split(samples.target, np.cumsum(samples.target_lengths)[:-1])]
    assert len(set(answers)) == len(answers) == manifest.corpora[1].counts["records"]


def test_consumed_targets_are_the_labels_that_were_trained_on(prepared):
    _, config, storage, manifest = prepared
    opener = plain_opener(storage, manifest)
    trained = []
    for batches in steps_of(prepared, 0, 1, 0, 4):
        for batch in batches:
            for line in range(MICRO):
                segments = batch.target_segments[line]
                trained += [batch.labels[line][segments == n].tolist() for n in range(1, segments.max() + 1)]
    assert [labels.tolist() for labels in consumed_targets(manifest, config, opener, 4)] == trained
    by_corpus = list(consumed_pairs(manifest, config, opener, 4))
    assert {name for name, _ in by_corpus} == {"long", "short"}
    tokenizer = Tokenizer.load(storage.read_bytes(manifest.tokenizer_path))
    for name, labels in by_corpus:
        assert tokenizer.decode(labels).startswith("it is ") == (name == "short")


def test_state_counts_samples_of_steps_handed_out(prepared):
    _, config, storage, manifest = prepared
    loader = Loader(manifest, config, plain_opener(storage, manifest), 0, 2, 7)
    loader.next_step()
    assert loader.data_wait_seconds > 0
    state = loader.state()
    loader.close()
    assert len(json.dumps(state)) < 1000 and len(state.pop("schedule")) == 16
    assert state == {"data_digest": manifest.digest, "seed": 9, "samples_consumed": 8 * GLOBAL, "quarantined": []}


def test_errors_of_the_reading_thread_reach_next_step_every_time(prepared):
    _, config, _, manifest = prepared

    def broken(shard):
        raise DataError(f"shard {shard.path} is broken")

    loader = Loader(manifest, config, broken, 0, 1, 0)
    for _ in range(2):
        with pytest.raises(DataError, match=r"shards/.*is broken"):
            loader.next_step()
    loader.close()
    assert not any(thread.name == "telar-loader" for thread in threading.enumerate())


def test_closing_ends_the_thread_while_it_waits_for_room(prepared):
    _, config, storage, manifest = prepared
    loader = Loader(manifest, config, plain_opener(storage, manifest), 0, 1, 0)
    loader.next_step()
    loader.close()
    loader.close()
    assert not any(thread.name == "telar-loader" for thread in threading.enumerate())


def test_shards_are_announced_before_they_are_opened(prepared):
    _, config, storage, manifest = prepared
    plain, announced, opened = plain_opener(storage, manifest), [], []

    class Opener:
        def prefetch(self, shards):
            announced.extend(shards)

        def __call__(self, shard):
            opened.append(shard)
            assert shard in announced
            return plain(shard)

    loader = Loader(manifest, config, Opener(), 0, 1, 0)
    loader.next_step()
    loader.close()
    assert opened


def test_a_file_that_vanishes_before_it_is_mapped_is_asked_for_again(prepared, tmp_path):
    _, config, storage, manifest = prepared
    plain, asked = plain_opener(storage, manifest), []

    def flaky(shard):
        asked.append(shard.path)
        return str(tmp_path / "evicted") if asked.count(shard.path) == 1 else plain(shard)

    reader = SampleReader(manifest, config, flaky)
    assert len(reader.read(np.arange(5)).pairs) == 5 and len(asked) == 2 * len(set(asked))


def test_a_weight_too_small_names_the_field(prepared):
    _, config, storage, manifest = prepared
    with pytest.raises(ConfigError, match=r"data\.corpora\.weight: weight 1e-06 .*long, short"):
        Loader(manifest.with_weights({"short": 1e-6}), config, plain_opener(storage, manifest), 0, 1, 0)


def test_collating_one_full_row_leaves_no_padding():
    row = (np.arange(10, 16), np.array([2, 4]), np.arange(20, 24), np.array([3, 1]))
    batch = collate(gather([row]), 3, 6, 4, pad_id=0, bos_id=1)
    assert batch.index == 3 and batch.loss_weight.all() and (batch.source_segments > 0).all()
    assert batch.target_tokens.tolist() == [[1, 20, 21, 1]] and batch.labels.tolist() == [[20, 21, 22, 23]]
