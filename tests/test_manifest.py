"""The manifest: round trip, looking up samples, damage, sending it elsewhere, and opening that costs nothing."""

import json
import pickle
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage import Storage
from configs.errors import DataError
from data import shard_table
from data.manifest import CorpusInfo, Manifest, RecordBatch, ShardInfo, Totals

HELD_OUT = ShardInfo("held_out/c.parquet", 3, 0, 0, 77, "ab" * 16)


def shard(number, rows, batches=2, corpus="c"):
    """A shard that exists in the manifest alone."""
    places = tuple(RecordBatch(504 + 100 * i, 100, (2**64 - 1 - number * 31 - i)) for i in range(batches))
    return ShardInfo(
        f"shards/{corpus}/{number:05d}.arrow", rows, rows * 3 + number, rows * 5, 999, f"{number:032x}", places
    )


def corpus_of(rows, name="c", batches=2):
    shards = tuple(shard(number, count, batches, name) for number, count in enumerate(rows))
    return CorpusInfo(name, 1.0, "likelihood", 7, shards, HELD_OUT, {"records": 12})


def manifest_of(*corpora, digest="abc"):
    return Manifest(digest, "t", 100, 0, 1, 2, 8, 16, corpora, "sequence", "chunk")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(shard_table, "BLOCK_SHARDS", 3)


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    storage = Storage(str(tmp_path / "store") if request.param == "local" else "memory://manifest-test")
    yield storage
    storage.remove()


def test_what_is_written_is_read_back(storage, small_blocks):
    made = manifest_of(corpus_of([4, 1, 9, 2, 2, 8, 8]), corpus_of([5], "d"), corpus_of([], "none"))
    written = made.write(storage)
    read = Manifest.read(storage, "data/abc")
    assert made == written == read and read.layout == "sequence" and read.packing == "chunk"
    assert read != made.with_weights({"d": 2.0}) and read.with_weights({"d": 2.0}) == made.with_weights({"d": 2.0})
    first, second = made.corpora[0], read.corpora[0]
    assert isinstance(second.shards, shard_table.TableShards) and isinstance(second.held_out, ShardInfo)
    assert list(second.shards) == list(first.shards) and len(second.shards) == 7
    assert second.totals == first.totals == Totals(34, sum(s.source_tokens for s in first.shards), 170)
    assert [second.shards[i] for i in range(-7, 7)] == [first.shards[i] for i in range(-7, 7)]
    assert second.shards[2:6] == first.shards[2:6] and second.shards[::-3] == first.shards[::-3]
    assert second.shards[3].batches == first.shards[3].batches and second.shards[3].batches[-1] == RecordBatch(
        604, 100, 2**64 - 1 - 94
    )
    assert second.shards[3].batches[:1] == first.shards[3].batches[:1]
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            second.shards[wrong]
    assert second.shards != first.shards[:-1] and second.shards != (*first.shards[:-1], shard(6, 9))
    assert [file.path for file in read.files()] == [file.path for file in made.files()]
    assert len(list(read.files())) == 8 + 3
    assert hash(second.shards[1]) == hash(first.shards[1])
    with pytest.raises(DataError, match="no corpus 'x'; corpora there: c, d, none"):
        read.corpus("x")


def test_the_same_manifest_gives_the_same_bytes_and_other_tools_read_the_table(tmp_path):
    contents = []
    for name in ("a", "b"):
        storage = Storage(str(tmp_path / name))
        manifest_of(corpus_of([4, 1, 9]), corpus_of([5], "d")).write(storage)
        contents.append([storage.read_bytes(f"data/abc/{file}") for file in ("manifest.json", "shards.arrow")])
    assert contents[0] == contents[1]
    table = pa.ipc.open_file(contents[0][1]).read_all()
    assert table["corpus"].to_pylist() == [0, 0, 0, 1] and table["first_row"].to_pylist() == [0, 4, 5, 0]
    assert table["batch_digests"][1].as_py() == [2**64 - 32, 2**64 - 33]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=25), block=st.integers(1, 6), seed=st.integers(0, 2**32 - 1)
)
def test_find_is_a_walk_through_the_shards(rows, block, seed):
    storage = Storage("memory://manifest-find")
    expected = [(number, row) for number, count in enumerate(rows) for row in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_table, "BLOCK_SHARDS", block)
        made = manifest_of(corpus_of([2, 3], "before"), corpus_of(rows))
        read = made.write(storage)
    asked = np.random.default_rng(seed).integers(0, len(expected), 40)
    for manifest in (made, read):
        for which in (asked, np.arange(len(expected)), asked[:0]):
            numbers, inside = manifest.corpora[1].find(which)
            assert list(zip(numbers.tolist(), inside.tolist(), strict=True)) == [expected[row] for row in which]
            assert numbers.dtype == inside.dtype == np.int64
        for wrong in (-1, len(expected)):
            with pytest.raises(AssertionError, match="no such row"):
                manifest.corpora[1].find(np.array([wrong]))
    storage.remove()


def test_damage_of_the_table_is_named_where_it_is_met(storage, small_blocks):
    made = manifest_of(corpus_of([4] * 9)).write(storage)
    content = storage.read_bytes("data/abc/shards.arrow")
    block = made.corpora[0].shards._table.blocks[0][1]
    for place in range(block.offset, block.offset + block.bytes, 13):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        storage.write_bytes("data/abc/shards.arrow", bytes(damaged))
        corpus = Manifest.read(storage, "data/abc").corpora[0]
        assert corpus.find(np.array([0, 11, 24, 35]))[0].tolist() == [0, 2, 6, 8] and corpus.rows == 36
        match = rf"shards\.arrow: bytes {block.offset} to \d+ do not match their digest"
        for use in (
            lambda corpus=corpus: corpus.find(np.array([0, 12])),
            lambda corpus=corpus: corpus.shards[5],
            lambda corpus=corpus: list(corpus.shards),
        ):
            with pytest.raises(DataError, match=match):
                use()
    for cut in (content[:-1], content[: block.offset], b"", content + b"x"):
        storage.write_bytes("data/abc/shards.arrow", cut)
        with pytest.raises(DataError, match=rf"shards\.arrow.* {len(cut)} bytes, the manifest says {len(content)}"):
            Manifest.read(storage, "data/abc")
    storage.remove("data/abc/shards.arrow")
    with pytest.raises(DataError, match=r"shards\.arrow does not exist; remove the folder"):
        Manifest.read(storage, "data/abc")


def test_a_manifest_that_cannot_be_used_says_what_to_do(storage):
    manifest_of(corpus_of([4])).write(storage)
    path = "data/abc/manifest.json"
    good = storage.read_text(path)
    for old, new, match in (
        ('"pairs": 7', '"pairs": 8', "content does not match its digest; remove the folder and prepare again"),
        ('"format_version": 2', '"format_version": 1', r"another version of Telar \(format 1, this one reads 2\); run"),
        ("{", "", "no manifest .*prepare again"),
    ):
        assert old in good
        storage.write_text(path, good.replace(old, new, 1))
        with pytest.raises(DataError, match=match):
            Manifest.read(storage, "data/abc")
    storage.write_bytes(path, b"\xff\xfe")
    with pytest.raises(DataError, match="no manifest"):
        Manifest.read(storage, "data/abc")
    storage.write_text("data/other/manifest.json", good)
    storage.write_bytes("data/other/shards.arrow", storage.read_bytes("data/abc/shards.arrow"))
    with pytest.raises(DataError, match="belongs to data/abc"):
        Manifest.read(storage, "data/other")
    with pytest.raises(DataError, match=r"data/none/manifest\.json does not exist.*prepare stage again"):
        Manifest.read(storage, "data/none")


def test_a_pickled_manifest_is_a_reference_that_is_opened_anew(storage):
    made = manifest_of(corpus_of([4] * 2000, batches=20))
    read = made.write(storage).with_weights({"c": 3.0})
    content = pickle.dumps(read)
    assert len(content) < 2000
    again = pickle.loads(content)
    assert again == read and again.corpora[0].weight == 3.0
    assert again.corpora[0].find(np.array([4001])) == (np.array([1000]), np.array([1]))
    shard = pickle.loads(pickle.dumps(again.corpora[0].shards[1999]))
    assert shard == made.corpora[0].shards[1999] and len(pickle.dumps(shard)) < 2500
    assert pickle.loads(pickle.dumps(made)) == made


def test_receipts_of_shards_survive_json():
    info = shard(3, 5)
    assert ShardInfo(**json.loads(json.dumps(asdict(info)))) == info


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Manifests of 10^6 and 10^9 samples, 8,192 in a shard, whose shards do not exist."""
    storage = Storage(str(tmp_path_factory.mktemp("sizes")))
    for digest, shards in (("small", 122), ("large", 122_071)):
        manifest_of(corpus_of([8192] * shards, batches=1), digest=digest).write(storage)
    return storage


def test_opening_does_not_depend_on_the_number_of_samples(sizes, monkeypatch):
    read_blocks = []
    columns = shard_table._Columns
    monkeypatch.setattr(shard_table, "_Columns", lambda content: read_blocks.append(content.size) or columns(content))
    process = psutil.Process()
    peaks, resident = {}, {}
    for digest in ("small", "large"):
        Manifest.read(sizes, f"data/{digest}")
        before = process.memory_info().rss
        tracemalloc.start()
        manifest = Manifest.read(sizes, f"data/{digest}")
        peaks[digest] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        resident[digest] = process.memory_info().rss - before
        assert read_blocks == [], "opening reads nothing of the table"
        corpus = manifest.corpora[0]
        assert corpus.find(np.array([corpus.rows - 1]))[0].tolist() == [len(corpus.shards) - 1]
        assert corpus.shards[len(corpus.shards) - 1].rows == 8192
        assert len(read_blocks) == 1 and read_blocks.pop() < 100_000, "a look-up reads one block"
    assert manifest.corpora[0].rows > 10**9 and len(manifest.corpora[0].shards) == 122_071
    table = Path(sizes.local_path("data/large/shards.arrow")).stat().st_size
    text = Path(sizes.local_path("data/large/manifest.json")).stat().st_size
    # A thousandfold of samples: 477 blocks more to know of, 110 bytes of JSON each.
    assert table > 10 * 2**20 and text < 64_000
    assert peaks["large"] < 700_000 and resident["large"] < 2 * 2**20


def test_an_open_manifest_takes_no_file_descriptor(sizes):
    before = set(Path("/proc/self/fd").iterdir())
    manifests = [Manifest.read(sizes, "data/small") for _ in range(10)]
    assert set(Path("/proc/self/fd").iterdir()) <= before
    assert all(manifest.corpora[0].find(np.array([8192]))[0] == [1] for manifest in manifests)
