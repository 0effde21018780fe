"""Exactness of real loaders: layouts, buckets, world sizes, resizing, quarantine, the ring and states."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data.batches import Collator
from data.loader import STEPS_HELD, Loader, consumed_targets
from data.mixture import make_order
from data.quarantine import QuarantinedShard
from data.ring import Arrays, Ring
from data.shard_server import plain_opener
from data.state import make_state, schedule_digest
from data.token_batches import TokenBatches
from jobs.batches import to_model
from tests.sample_data import BOS, FIELDS, PAD, expected_row, numbered, prepare_samples, rows_in

CAPACITIES = (12, 16)
ROWS, BATCH, MICRO = 96, 12, 2
LAYOUTS = ("pairs", "sequence")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """By (layout, bucket_batches): configuration, storage, manifest and samples of one corpus."""
    made = {}
    for layout in LAYOUTS:
        samples = numbered(np.random.default_rng(1), ROWS, layout, *CAPACITIES)
        for buckets in (0, 3):
            folder = tmp_path_factory.mktemp("exact")
            data = {"bucket_batches": buckets, "packing": "none"}
            made[layout, buckets] = *prepare_samples(folder, {"only": samples}, layout, CAPACITIES, data=data), samples
    return made


@pytest.fixture
def dense(tmp_path):
    """Layout sequence with one full pair without source in each row."""
    samples = [[(np.empty(0, int), np.arange(16 * i + 3, 16 * i + 19))] for i in range(40)]
    return *prepare_samples(tmp_path, {"only": samples}, "sequence", CAPACITIES), samples


def loader_of(made, replica=0, replicas=1, step=0, open_shard=None):
    config, storage, manifest, _ = made
    return Loader(manifest, config, open_shard or plain_opener(storage, manifest), replica, replicas, step)


def take(loader, steps):
    """Rows of the loader's next steps by (step, micro-batch); the loader is closed."""
    found = {}
    try:
        for _ in range(steps):
            batches = loader.next_step()
            step = loader.state()["samples_consumed"] // BATCH - 1
            for batch in batches:
                found[step, batch.index] = rows_in(batch)
        return found
    finally:
        loader.close()


def real(found):
    return {key: rows for key, rows in found.items() if key[1] < BATCH // MICRO}


def label_counts(found):
    """How often each token was a label that counts."""
    return Counter(
        label
        for rows in real(found).values()
        for row in rows
        for label, weight in zip(row["labels"], row["loss_weight"], strict=True)
        if weight
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_equal_samples_laid_out_token_by_token(prepared, layout):
    config, _, manifest, samples = made = prepared[layout, 0]
    order = make_order(manifest, config)
    found = take(loader_of(made), 5)
    assert len(found) == 5 * BATCH // MICRO
    for (step, index), rows in found.items():
        places = step * BATCH + index * MICRO + np.arange(MICRO)
        assert rows == [expected_row(samples[row], layout, CAPACITIES) for row in order(places)[2].tolist()]


def test_dense_rows_equal_samples_laid_out_token_by_token(dense):
    config, _, manifest, samples = dense
    rows = [row for rows in take(loader_of(dense), 3).values() for row in rows]
    numbers = make_order(manifest, config)(np.arange(3 * BATCH))[2].tolist()
    assert rows == [expected_row(samples[number], "sequence", CAPACITIES) for number in numbers]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("buckets", [0, 3])
def test_an_epoch_trains_every_label_once(prepared, layout, buckets):
    made = prepared[layout, buckets]
    # 96 samples: 8 steps, which 3 batches to a window do not divide; 24 steps are three epochs.
    steps, times = (24, 3) if buckets else (8, 1)
    counts = label_counts(take(loader_of(made), steps))
    labels = [label for sample in made[3] for _, target in sample for label in target.tolist()]
    assert counts == Counter(dict.fromkeys(labels, times))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buckets_move_whole_samples_within_their_window_and_pad_less(prepared, layout):
    samples = prepared[layout, 0][3]
    plain, bucketed = (take(loader_of(prepared[layout, buckets]), 6) for buckets in (0, 3))
    rows = {first_label(expected_row(sample, layout, CAPACITIES)): sample for sample in samples}
    width = 0
    for found in bucketed.values():
        widths = len(found[0]["source_tokens"]), len(found[0]["labels"])
        assert [expected_row(rows[first_label(row)], layout, CAPACITIES, widths) for row in found] == found
        longest = [max(sum(map(bool, row[f"{side}_segments"])) for row in found) for side in ("source", "target")]
        for at, (side, capacity) in enumerate(zip(widths, CAPACITIES, strict=True)):
            if layout == "pairs" or at == 1:
                assert side == min(capacity, -(-max(longest[at], 1) // 8) * 8)
        width += len(found) * widths[1]
    for window in (0, 1):
        own = [
            sorted(first_label(row) for (step, _), rows in found.items() if step // 3 == window for row in rows)
            for found in (plain, bucketed)
        ]
        assert own[0] == own[1] and len(own[0]) == 3 * BATCH
    assert width < 6 * BATCH * CAPACITIES[1]


@pytest.mark.parametrize("key", [("pairs", 3), ("sequence", 0), ("sequence", 3)])
def test_consumed_targets_are_the_labels_that_were_trained_on(prepared, key):
    config, storage, manifest, _ = made = prepared[key]
    consumed = consumed_targets(manifest, config, plain_opener(storage, manifest), 7)
    trained = [
        label
        for _, rows in sorted(take(loader_of(made), 7).items())
        for row in rows
        for label, weight in zip(row["labels"], row["loss_weight"], strict=True)
        if weight
    ]
    assert np.concatenate(list(consumed)).tolist() == trained


def first_label(row):
    return row["labels"][0]


@pytest.fixture(scope="module")
def alone(prepared):
    """What one replica gets of 8 steps, by data."""
    return {key: take(loader_of(made), 8) for key, made in prepared.items()}


@pytest.mark.parametrize("replicas", range(1, 10))
def test_world_sizes_one_to_nine_see_the_same_global_batches(prepared, alone, replicas):
    for key in (("pairs", 0), ("sequence", 3)):
        shared = [take(loader_of(prepared[key], replica, replicas), 4) for replica in range(replicas)]
        found = {place: rows for one in shared for place, rows in one.items()}
        assert len(found) == sum(map(len, shared)), "two replicas have one micro-batch"
        assert real(found) == {place: rows for place, rows in alone[key].items() if place[0] < 4}
        copies = [row for place, rows in found.items() if place not in real(found) for row in rows]
        assert not any(any(row["loss_weight"]) for row in copies)
        assert len(copies) == 4 * MICRO * (-(BATCH // MICRO) % replicas)


@pytest.mark.parametrize("key", [(layout, buckets) for layout in LAYOUTS for buckets in (0, 3)])
def test_four_then_three_then_eight_replicas_see_the_same_global_batches(prepared, alone, key):
    found, state = {}, None
    for replicas, steps in ((4, 2), (3, 2), (8, 4)):
        states = []
        for replica in range(replicas):
            loader = loader_of(prepared[key], replica, replicas)
            if state is not None:
                loader.load_state(state)
            found |= real(take(loader, steps))
            states.append(loader.state())
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
    assert found == alone[key]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_resizes_at_any_steps_see_the_same_global_batches(prepared, alone, data):
    key = data.draw(st.sampled_from([(layout, buckets) for layout in LAYOUTS for buckets in (0, 3)]))
    found, step = {}, 0
    while step < 8:
        replicas = data.draw(st.integers(1, 9))
        steps = data.draw(st.integers(1, 8 - step))
        for replica in range(replicas):
            found |= real(take(loader_of(prepared[key], replica, replicas, step), steps))
        step += steps
    assert found == alone[key]


def test_peers_of_a_replica_get_equal_batches(prepared):
    peers = [take(loader_of(prepared["pairs", 0], 1, 2), 3) for _ in range(3)]
    assert peers[0] == peers[1] == peers[2] and len(peers[0]) == 9


def test_a_step_stays_valid_for_one_more_and_memory_is_reused(prepared):
    loader = loader_of(prepared["sequence", 0])
    try:
        addresses, held = set(), []
        for _ in range(20):
            batches = loader.next_step()
            held.append((batches, [rows_in(batch) for batch in batches]))
            for kept, rows in held[-STEPS_HELD:]:
                assert [rows_in(batch) for batch in kept] == rows
            addresses |= {batch.labels.ctypes.data for batch in batches}
        assert len(addresses) <= 4 * BATCH // MICRO
    finally:
        loader.close()


def test_model_tensors_share_the_memory_of_batches(prepared, dense):
    for made in (prepared["pairs", 0], prepared["sequence", 3], dense):
        loader = loader_of(made)
        try:
            for batch in loader.next_step():
                model = to_model(batch)
                for name, tensor in zip(FIELDS, (*model.inputs, model.labels, model.loss_weight), strict=True):
                    array = getattr(batch, name)
                    assert tensor.shape == array.shape and tensor.numpy().dtype == array.dtype
                    assert tensor.numel() == 0 or tensor.data_ptr() == array.ctypes.data, name
        finally:
            loader.close()


def test_what_dense_batches_share_cannot_be_written_to(dense):
    loader = loader_of(dense)
    try:
        first, second = loader.next_step()[:2]
    finally:
        loader.close()
    for name in ("target_positions", "target_segments", "loss_weight"):
        assert np.shares_memory(getattr(first, name), getattr(second, name))
        with pytest.raises(ValueError, match="read-only"):
            getattr(first, name)[0, 0] = 5
    assert not np.shares_memory(first.labels, second.labels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_a_quarantined_shard_are_masked_in_their_places(prepared, alone, layout):
    _, storage, manifest, samples = made = prepared[layout, 0]
    plain, bad, asked = plain_opener(storage, manifest), manifest.corpora[0].shards[2], []

    def open_shard(shard):
        asked.append(shard.path)
        if shard.path == bad.path:
            raise QuarantinedShard(shard.path, f"shard {shard.path} is quarantined")
        return plain(shard)

    loader = loader_of(made, open_shard=open_shard)
    found = take(loader, 8)
    first = {(np.concatenate(sample[0]) if layout == "sequence" else sample[0][1])[0] for sample in samples[32:48]}
    masked = expected_row([], layout, CAPACITIES)
    for place, rows in alone[layout, 0].items():
        assert found[place] == [masked if first_label(row) in first else row for row in rows]
    assert sum(row == masked for rows in found.values() for row in rows) == 16
    assert asked.count(bad.path) == 1
    assert loader.state()["quarantined"] == [bad.path]

    class Opener:
        restored = ()
        __call__ = staticmethod(plain)

        def restore(self, shards):
            self.restored = shards

    opener = Opener()
    after = loader_of(made, open_shard=opener)
    after.load_state(loader.state())
    after.close()
    assert list(opener.restored) == [bad] and after.state() == loader.state()


def test_buckets_refuse_a_quarantined_shard(prepared):
    made = prepared["pairs", 3]

    def open_shard(shard):
        raise QuarantinedShard(shard.path, "quarantined")

    with pytest.raises(DataError, match=r"data\.bucket_batches: shard shards/only/.*prepare stage again"):
        take(loader_of(made, open_shard=open_shard), 1)


def test_a_state_is_small_whatever_was_quarantined_and_refused_elsewhere(prepared):
    made = prepared["pairs", 0]
    config, _, manifest, _ = made
    loader = loader_of(made)
    loader.next_step()
    state = loader.state()
    try:
        with pytest.raises(DataError, match="taken with data xyz, this run has abc"):
            loader.load_state({**state, "data_digest": "xyz"})
        with pytest.raises(ConfigError, match=r"run\.seed: .* seed 8, this run has 9"):
            loader.load_state({**state, "seed": 8})
        with pytest.raises(ConfigError, match=r"train\.global_batch_sequences: .* 13 samples"):
            loader.load_state({**state, "samples_consumed": 13})
        with pytest.raises(ConfigError, match=r"data\.lanes.*data\.bucket_batches"):
            loader.load_state({**state, "schedule": "0" * 16})
        loader.load_state(state)
        assert loader.state() == state
        many = [f"shards/a-corpus-with-a-name/{number:05d}-{number:05d}.arrow" * 4 for number in range(1000)]
        assert len(json.dumps(make_state(manifest, config, 2**50, many))) < 1000
    finally:
        loader.close()


def test_later_weight_changes_may_be_appended_and_earlier_ones_not(prepared):
    config, _, manifest, _ = prepared["pairs", 0]

    def digest(*steps):
        changes = tuple({"from_step": step, "weights": {"only": 2.0}} for step in steps)
        tree = config.model_dump(mode="json")
        tree["data"]["weight_changes"] = list(changes)
        return schedule_digest(manifest, type(config).model_validate_json(json.dumps(tree)), 10 * BATCH)

    assert digest() == digest(10) == digest(11, 12) != digest(9)
    assert digest(9) == digest(9, 30) != digest(8)


def test_token_batches_are_the_samples_in_the_order(prepared, dense):
    for made in (prepared["sequence", 0], dense):
        config, storage, manifest, samples = made
        numbers = make_order(manifest, config)(np.arange(1000))[2].tolist()
        for start in (0, 13):
            batches = TokenBatches(manifest, config, plain_opener(storage, manifest), 5, start)
            for number in range(20):
                tokens = next(batches)
                assert tokens.dtype == torch.int64 and tokens.shape == (5, CAPACITIES[1])
                own = numbers[start + 5 * number : start + 5 * number + 5]
                assert tokens.tolist() == [expected_row(samples[i], "sequence", CAPACITIES)["labels"] for i in own]
            assert batches.position == start + 100
    config, storage, manifest, _ = prepared["pairs", 0]
    with pytest.raises(ConfigError, match=r"data\.layout"):
        TokenBatches(manifest, config, plain_opener(storage, manifest), 5)


def test_the_ring_is_pinned_where_this_process_uses_cuda(monkeypatch):
    empty, pinned = torch.empty, []

    def asked(size, dtype, pin_memory=False):
        pinned.append(pin_memory)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", asked)
    plain = Ring(2, 3, 4, 5).take()
    assert not pinned
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    slot = Ring(2, 3, 4, 5).take()
    assert pinned == [True] * len(FIELDS) * 3 * 2
    for name in FIELDS:
        one, other = getattr(plain[0], name), getattr(slot[0], name)
        assert one.shape == other.shape and one.dtype == other.dtype


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_rows_collate_as_token_by_token(data):
    layout, fitted = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.booleans())
    capacities = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    rows = []
    samples = []
    for _ in range(data.draw(st.integers(1, 4))):
        sample = [] if data.draw(st.booleans()) else None
        if sample is None:
            generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
            (sample,) = numbered(generator, 1, layout, *capacities)
        samples.append(sample)
        sides = [[pair[side] for pair in sample] for side in (0, 1)]
        row = []
        for side in sides:
            row += [np.concatenate([np.empty(0, int), *side]).astype(np.uint32), np.array([*map(len, side)], np.int32)]
        rows.append(tuple(row))
    collator = Collator(layout == "sequence", 4, *capacities, PAD, BOS, fitted)
    # Memory as an earlier batch may have left it.
    arrays = Arrays.empty(*collator.sizes)
    for name in FIELDS:
        getattr(arrays, name).fill(77)
    batch = collator.fill(rows, 5, arrays)
    widths = batch.source_tokens.shape[1], batch.labels.shape[1]
    assert batch.index == 5 and (fitted or widths[1] == capacities[1])
    assert rows_in(batch) == [expected_row(sample, layout, capacities, widths) for sample in samples]
