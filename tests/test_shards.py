"""Shard files: what is written comes back, damage of any byte is named or harmless, and memory and files are let go."""

import gc
import weakref
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage import Storage
from configs.errors import DataError
from data.manifest import RecordBatch
from data.shards import ShardReader, gather, write_shard

LENGTHS = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4), min_size=1)


def made(lengths, seed=0, vocabulary_size=70_000):
    """Samples of pairs with the lengths given."""
    generator = np.random.default_rng(seed)
    return [
        [(generator.integers(0, vocabulary_size, s), generator.integers(0, vocabulary_size, t)) for s, t in sample]
        for sample in lengths
    ]


def flat(sample):
    """A sample as a reader gives it, computed from its pairs."""
    sides = [[pair[side].tolist() for pair in sample] for side in (0, 1)]
    tokens = [list(chain.from_iterable(side)) for side in sides]
    lengths = [list(map(len, side)) for side in sides]
    return [tokens[0], lengths[0], tokens[1], lengths[1]]


def listed(row):
    return [part.tolist() for part in row]


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small shard of three record batches: (path, info, samples, bytes)."""
    storage = Storage(str(tmp_path_factory.mktemp("shard")))
    samples = made([[(3, 4)], [(0, 2), (5, 1)], [(2, 2)], [(1, 1)], [(4, 3), (1, 2)]], vocabulary_size=60_000)
    info = write_shard(storage, "s.arrow", samples, 60_000, 2)
    path = storage.local_path("s.arrow")
    return path, info, samples, Path(path).read_bytes()


@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, block_rows=st.integers(1, 5), vocabulary_size=st.sampled_from([10, 1 << 16, (1 << 16) + 1]))
def test_rows_come_back_in_any_order_and_lengths_without_them(tmp_path_factory, lengths, block_rows, vocabulary_size):
    storage = Storage(str(tmp_path_factory.mktemp("shard")))
    samples = made(lengths, vocabulary_size=vocabulary_size)
    info = write_shard(storage, "s.arrow", iter(samples), vocabulary_size, block_rows)
    expected = [flat(sample) for sample in samples]
    assert info.rows == len(samples) and len(info.batches) == -(-len(samples) // block_rows)
    assert info.source_tokens == sum(len(row[0]) for row in expected)
    assert info.target_tokens == sum(len(row[2]) for row in expected)
    reader = ShardReader(storage.local_path("s.arrow"), info)
    asked = np.random.default_rng(1).integers(0, len(samples), 2 * len(samples))
    source, target = reader.lengths(asked)
    assert source.tolist() == [len(expected[i][0]) for i in asked] and source.dtype == np.int64
    assert target.tolist() == [len(expected[i][2]) for i in asked] and target.dtype == np.int64
    rows = reader.rows(asked)
    assert [listed(row) for row in rows] == [expected[i] for i in asked]
    assert listed(reader.row(len(samples) - 1)) == expected[-1]
    assert {part.dtype for row in rows for part in row[::2]} == {
        np.dtype(np.uint32 if vocabulary_size > 1 << 16 else np.uint16)
    }
    samples_gathered = gather(rows)
    assert samples_gathered.target.tolist() == list(chain.from_iterable(expected[i][2] for i in asked))
    assert samples_gathered.pairs.tolist() == [len(expected[i][1]) for i in asked]
    reader.verify()


def test_bytes_follow_from_the_samples_alone_and_record_batches_lie_where_arrow_reads_them(storage, written):
    _, info, samples, content = written
    for other in (storage, Storage("memory://shards-test")):
        assert replace(write_shard(other, "again.arrow", samples, 60_000, 2), path="s.arrow") == info
        assert other.read_bytes("again.arrow") == content
        other.remove("again.arrow")
    assert info.bytes == len(content) and info.digest == xxhash.xxh3_128_hexdigest(content)
    file = pa.ipc.open_file(content)
    assert file.read_all().column("target").to_pylist() == [flat(sample)[2] for sample in samples]
    assert file.num_record_batches == len(info.batches) == 3
    for number, batch in enumerate(info.batches):
        part = content[batch.offset : batch.offset + batch.bytes]
        assert xxhash.xxh3_64_intdigest(part) == batch.digest
        assert pa.ipc.read_record_batch(pa.py_buffer(part), file.schema).equals(file.get_batch(number))
        if number:
            assert batch.offset == info.batches[number - 1].offset + info.batches[number - 1].bytes


def test_views_are_of_the_map_and_cannot_be_written(written):
    path, info, _, _ = written
    reader = ShardReader(path, info)
    for part in reader.row(1):
        assert not part.flags.owndata and not part.flags.writeable
    starts, ends = reader.spans(np.array([4, 0]))
    assert starts.shape == ends.shape == (4, 2)
    assert reader.tokens[starts[2, 0] : ends[2, 0]].tolist() == reader.row(4)[2].tolist()
    assert reader.numbers[starts[1, 1] : ends[1, 1]].tolist() == reader.row(0)[1].tolist()
    with pytest.raises(AssertionError, match="no such row"):
        reader.rows(np.array([5]))


def read_all(path, info, check):
    """All that a reader can give; lengths first, from record batches that nobody has compared yet."""
    reader = ShardReader(path, info, check)
    rows = np.arange(info.rows)
    reader.lengths(rows)
    return [listed(row) for row in reader.rows(rows)]


@pytest.mark.parametrize("mask", [0xFF, 0x01, 0x30])
def test_whatever_byte_is_wrong_no_wrong_token_is_read(tmp_path, written, mask):
    _, info, samples, content = written
    expected = [flat(sample) for sample in samples]
    path = str(tmp_path / "damaged.arrow")
    body = set()
    for batch in info.batches:
        body.update(range(batch.offset, batch.offset + batch.bytes))
    header, footer = range(8, min(body)), range(max(body) + 1, len(content))
    unnoticed = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= mask
        Path(path).write_bytes(damaged)
        try:
            assert read_all(path, info, check=True) == expected
            unnoticed.append(place)
        except DataError as error:
            assert "shard s.arrow: " in str(error)
        # Nothing is promised but that garbled offsets and headers cannot lead outside the file.
        with suppress(DataError):
            read_all(path, info, check=False)
        if place % 7 == 0:
            try:
                reader = ShardReader(path, info)
            except DataError:
                continue
            with pytest.raises(DataError, match=r"shard s\.arrow: .*does not match its digest"):
                reader.verify()
    assert not body & set(unnoticed), "a record batch differs from its digest"
    assert not set(unnoticed) & set(range(6)), "the magic at the beginning"
    assert not set(unnoticed) & set(footer[-6:]), "the magic at the end"
    # Header and footer have bytes without a meaning (padding) or one that readers do not use (places of blocks).
    assert len(set(unnoticed) & set(header)) < len(header) and len(set(unnoticed) & set(footer)) < len(footer)


def test_one_record_batch_is_checked_at_a_time(tmp_path, written):
    whole, info, samples, content = written
    damaged = bytearray(content)
    labels, _ = ShardReader(whole, info).spans(np.array([3]))
    damaged[2 * int(labels[2, 0])] ^= 4
    path = tmp_path / "damaged.arrow"
    path.write_bytes(damaged)
    reader = ShardReader(str(path), info)
    reader.verify_batch(0)
    with pytest.raises(DataError, match=r"shard s\.arrow: .*does not match its digest in record batch 1"):
        reader.verify_batch(1)
    assert listed(reader.row(4)) == flat(samples[4])
    for _ in range(2):
        with pytest.raises(DataError, match="record batch 1"):
            reader.rows(np.array([0, 3]))
    assert ShardReader(str(path), info, check=False).row(3)[2].tolist() == [flat(samples[3])[2][0] ^ 4]


@pytest.mark.parametrize("kept", [0, 3, 8, 400, 0.5, 0.9, -1])
def test_a_cut_file_is_named(tmp_path, written, kept):
    _, info, _, content = written
    path = tmp_path / "cut.arrow"
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"shard s\.arrow: .*cut\.arrow (has \d+ bytes|is no Arrow file)"):
        ShardReader(str(path), info)
    with pytest.raises(FileNotFoundError):
        ShardReader(str(tmp_path / "none"), info)


def test_a_file_that_is_another_shard_is_named(tmp_path, written):
    path, info, _, content = written
    size = len(content)
    other = pa.BufferOutputStream()
    with pa.ipc.new_file(other, pa.schema([("a", pa.int8())])) as writer:
        writer.write_batch(pa.record_batch([pa.array([1] * 9000, pa.int8())], names=["a"]))
    elsewhere = tmp_path / "other.arrow"
    elsewhere.write_bytes(other.getvalue())
    for changed, match in (
        (replace(info, rows=6), "does not hold 6 rows"),
        (replace(info, batches=info.batches[:2]), "holds 3 record batches, the manifest says 2"),
        (replace(info, batches=()), "holds 3 record batches, the manifest says 0"),
        (replace(info, batches=(*info.batches[:2], RecordBatch(size - 8, 99, 0))), "shorter than its record batches"),
        (replace(info, batches=tuple(reversed(info.batches))), "does not hold 5 rows"),
    ):
        with pytest.raises(DataError, match=match):
            ShardReader(path, changed)
    with pytest.raises(DataError, match="holds other columns than a shard"):
        ShardReader(str(elsewhere), replace(info, bytes=elsewhere.stat().st_size))


def test_a_shard_is_written_block_by_block_and_whole_or_not_at_all(storage):
    alive, most = 0, 0

    def freed():
        nonlocal alive
        alive -= 1

    def samples(count, broken=False):
        nonlocal alive, most
        for _ in range(count):
            tokens = np.arange(50)
            weakref.finalize(tokens, freed)
            alive += 1
            most = max(most, alive)
            yield [(tokens, tokens)]
            del tokens
        if broken:
            raise ValueError("no more")

    info = write_shard(storage, "shards/s.arrow", samples(400), 100, 8)
    assert info.rows == 400 and len(info.batches) == 50
    assert 8 <= most <= 24
    with pytest.raises(ValueError, match="no more"):
        write_shard(storage, "shards/t.arrow", samples(20, broken=True), 100, 8)
    assert [file.name for file in Path(storage.local_path("shards")).iterdir()] == ["s.arrow"]


def test_readers_keep_no_file_open_and_let_go_of_the_map(storage):
    info = write_shard(storage, "s.arrow", made([[(5, 5)]] * 40), 70_000, 8)
    path = storage.local_path("s.arrow")

    def mapped():
        return sum(path in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = set(Path("/proc/self/fd").iterdir())
    readers = [ShardReader(path, info) for _ in range(20)]
    rows = [reader.rows(np.arange(40)) for reader in readers]
    gc.collect()
    assert set(Path("/proc/self/fd").iterdir()) <= before and mapped() == 20
    for reader in readers:
        reader.close()
    last = listed(rows[3][39])
    assert mapped() == 20, "views that were handed out keep their map"
    assert listed(rows[3][39]) == last
    del rows
    gc.collect()
    assert mapped() == 0
