"""Shards on a node: verified copies, damage, lost connections, a bounded disk, and the Ray actor around them."""

import threading
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Storage
from configs.errors import DataError
from data import shard_cache
from data.manifest import CorpusInfo, Manifest
from data.prepare import prepare, ray_tasks
from data.runners import serial
from data.shard_cache import ShardCache
from data.shard_server import plain_opener, shard_opener, start_servers, stop_servers
from data.shards import ShardReader, write_shard
from tests.test_data_prepare import files_below, make_config, write_code

ROWS = 10


def fill(storage, shards=5):
    """Some shards of random samples and the manifest that lists them."""
    inside, generator = storage.child("data/abc"), np.random.default_rng(0)
    infos = []
    for number in range(shards):
        pairs = [[(generator.integers(0, 99, 7), generator.integers(0, 99, 5))] for _ in range(ROWS)]
        infos.append(write_shard(inside, f"shards/c/{number:05d}-000.arrow", pairs, 100, 4))
    corpus = CorpusInfo("c", 1.0, "likelihood", shards * ROWS, tuple(infos), infos[0], {})
    return Manifest("abc", "t", 100, 0, 1, 2, 8, 8, (corpus,)).write(storage), infos


@pytest.fixture
def remote():
    storage = Storage("memory://shard-test")
    yield storage
    storage.remove()


@pytest.fixture
def clock(monkeypatch):
    """Back-off takes no time; what was asked for is recorded."""
    slept = []
    monkeypatch.setattr(shard_cache.time, "sleep", slept.append)
    return slept


def flip(content, place):
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


@pytest.mark.parametrize("vocabulary_size", [100, 1 << 16, (1 << 16) + 1])
def test_a_shard_gives_back_what_was_written(tmp_path, vocabulary_size):
    storage, generator = Storage(str(tmp_path)), np.random.default_rng(1)
    samples = [
        [(generator.integers(0, vocabulary_size, s), generator.integers(0, vocabulary_size, t)) for s, t in sample]
        for sample in ([(3, 1)], [(1, 1), (2, 5), (4, 4)], [(9, 2)], [(1, 8), (1, 1)], [(2, 2)])
    ]
    info = write_shard(storage, "s.arrow", samples, vocabulary_size, 2)
    assert (info.rows, info.source_tokens, info.target_tokens) == (5, 23, 24)
    reader = ShardReader(storage.local_path("s.arrow"), info)
    for row in (4, 0, 3, 1, 2):
        source, source_lengths, target, target_lengths = reader.row(row)
        assert source.dtype == (np.uint32 if vocabulary_size > 1 << 16 else np.uint16)
        assert not source.flags.owndata and not source.flags.writeable
        for side, tokens, lengths in ((0, source, source_lengths), (1, target, target_lengths)):
            parts = np.split(tokens, np.cumsum(lengths)[:-1])
            for part, pair in zip(parts, samples[row], strict=True):
                assert np.array_equal(part, pair[side])


def test_local_shards_are_verified_in_place_and_damage_is_named(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    manifest, infos = fill(storage)
    opener = plain_opener(storage, manifest, str(tmp_path / "cache"))
    assert opener(infos[0]) == storage.local_path(f"data/abc/{infos[0].path}")
    assert not (tmp_path / "cache").exists()
    path = Path(storage.local_path(f"data/abc/{infos[1].path}"))
    for place in (0, 400, -1):
        content = path.read_bytes()
        path.write_bytes(flip(content, place))
        with pytest.raises(DataError, match=r"shard shards/c/00001-000\.arrow: .*does not match its digest"):
            opener(infos[1])
        path.write_bytes(content)
    assert opener(infos[1]) == str(path)
    storage.remove(f"data/abc/{infos[2].path}")
    with pytest.raises(DataError, match=r"shard shards/c/00002-000\.arrow: .*does not exist; run the prepare"):
        opener(infos[2])


def test_remote_shards_are_fetched_once_and_survive_a_restart(tmp_path, remote):
    manifest, infos = fill(remote)
    cache = ShardCache(remote, manifest, str(tmp_path), 10**9)
    paths = [cache.path(info) for info in infos for _ in range(3)]
    assert cache.fetched_bytes == sum(info.bytes for info in infos)
    assert Path(paths[0]).read_bytes() == remote.read_bytes(f"data/abc/{infos[0].path}")
    again = ShardCache(remote, manifest, str(tmp_path), 10**9)
    assert again.path(infos[3]) == cache.path(infos[3]) and again.fetched_bytes == 0


def test_a_copy_damaged_while_nobody_ran_is_fetched_again(tmp_path, remote):
    manifest, infos = fill(remote)
    path = Path(ShardCache(remote, manifest, str(tmp_path), 10**9).path(infos[0]))
    good = path.read_bytes()
    path.write_bytes(flip(good, 100))
    again = ShardCache(remote, manifest, str(tmp_path), 10**9)
    assert Path(again.path(infos[0])).read_bytes() == good and again.fetched_bytes == infos[0].bytes


def test_damage_in_storage_is_named_after_one_more_fetch_and_never_served(tmp_path, remote):
    manifest, infos = fill(remote)
    name = f"data/abc/{infos[0].path}"
    remote.write_bytes(name, flip(remote.read_bytes(name), 64))
    cache = ShardCache(remote, manifest, str(tmp_path), 10**9)
    for turn in (1, 2):
        with pytest.raises(DataError, match=r"shard shards/c/00000-000\.arrow: .*does not match its digest"):
            cache.path(infos[0])
        assert cache.fetched_bytes == 2 * turn * infos[0].bytes
    assert list((tmp_path / "abc").iterdir()) == []


def test_lost_connections_are_tried_again_with_growing_waits(tmp_path, remote, clock, monkeypatch):
    manifest, infos = fill(remote)
    cache = ShardCache(remote, manifest, str(tmp_path), 10**9)
    opens, honest = [], cache._storage.open

    def flaky(path):
        opens.append(path)
        if len(opens) < 4:
            raise ConnectionResetError("gone")
        return honest(path)

    monkeypatch.setattr(cache._storage, "open", flaky)
    assert Path(cache.path(infos[0])).is_file()
    assert len(opens) == 4 and len(clock) == 3
    assert all(0.1 * 2**i <= seconds <= 0.2 * 2**i for i, seconds in enumerate(clock))

    def gone(path):
        opens.append(path)
        raise ConnectionResetError("gone")

    monkeypatch.setattr(cache._storage, "open", gone)
    opens.clear()
    with pytest.raises(ConnectionResetError):
        cache.path(infos[1])
    assert len(opens) == shard_cache.FETCH_TRIES


def test_the_cache_stays_within_its_bytes_and_drops_the_least_recently_used(tmp_path, remote, monkeypatch):
    manifest, infos = fill(remote)
    monkeypatch.setattr(shard_cache, "LEASE_SECONDS", 0.0)
    budget = sum(info.bytes for info in infos[:3])
    cache = ShardCache(remote, manifest, str(tmp_path), budget)
    for number in (0, 1, 2, 0, 3):
        cache.path(infos[number])
        assert sum(file.stat().st_size for file in (tmp_path / "abc").iterdir()) <= budget
    names = {file.name[len("shards--c--") :][:5] for file in (tmp_path / "abc").iterdir()}
    assert names == {"00000", "00002", "00003"}


def test_a_leased_file_is_not_evicted_even_when_the_cache_is_full(tmp_path, remote):
    manifest, infos = fill(remote)
    cache = ShardCache(remote, manifest, str(tmp_path), 1)
    paths = [cache.path(info) for info in infos]
    assert all(Path(path).is_file() for path in paths)


def test_threads_that_want_one_shard_fetch_it_once(tmp_path, remote):
    manifest, infos = fill(remote)
    cache = ShardCache(remote, manifest, str(tmp_path), 10**9)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.path(infos[0]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8 and cache.fetched_bytes == infos[0].bytes


def test_a_file_that_is_no_arrow_file_is_named(tmp_path):
    storage = Storage(str(tmp_path))
    _, infos = fill(storage)
    storage.write_bytes("junk", b"junk" * 100)
    with pytest.raises(DataError, match=r"shard shards/c/00000-000\.arrow: .*is no Arrow file"):
        ShardReader(storage.local_path("junk"), infos[0])


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.ray
def test_ray_tasks_prepare_the_same_bytes_and_pass_on_errors(tmp_path, ray_cluster):
    write_code(tmp_path / "code")
    config = make_config(tmp_path / "code")
    one, other = Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    prepare(config, one, serial, lambda line: None)
    prepare(config, other, ray_tasks(2), lambda line: None)
    assert files_below(one) == files_below(other)
    (tmp_path / "code" / "module_3.py").write_bytes(b"x = '\xff'")
    with pytest.raises(DataError, match=r"data\.corpora\[code\]\.path: .*module_3\.py is not UTF-8 \(byte 5\)"):
        prepare(config, Storage(str(tmp_path / "c")), ray_tasks(2), lambda line: None)


@pytest.mark.ray
def test_servers_hand_out_verified_paths_and_name_what_is_damaged(tmp_path, ray_cluster):
    storage = Storage(str(tmp_path / "store"))
    manifest, infos = fill(storage)
    path = Path(storage.local_path(f"data/abc/{infos[1].path}"))
    path.write_bytes(flip(path.read_bytes(), 300))
    servers = start_servers(make_config(tmp_path), storage, manifest, "test/attempt-1")
    try:
        assert len(servers) == 1
        opener = shard_opener(servers)
        opener.prefetch(infos)
        assert opener(infos[0]) == storage.local_path(f"data/abc/{infos[0].path}")
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard shards/c/00001-000\.arrow: .*does not match its digest"):
                opener(infos[1])
        assert ShardReader(opener(infos[2]), infos[2]).row(ROWS - 1)
    finally:
        stop_servers(servers)
    storage.remove("data/abc/manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        start_servers(make_config(tmp_path), storage, manifest, "test/attempt-2")
    stop_servers(None)
