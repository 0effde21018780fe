"""Shards under faults: damage, a bad store, a full disk, other processes. Every delivered token is compared."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from cluster.storage import Storage
from configs.errors import DataError
from data.fetch import Deadline, FetchTimeout
from data.file_locks import exclusive, is_held
from data.manifest import ShardInfo
from data.opener import plain_opener
from data.prefetch import Prefetcher
from data.quarantine import Quarantine, QuarantinedShard, shards_named
from tests.faulty_store import FaultyStore
from tests.shard_data import delivered, digest, fill

ROOT = Path(__file__).resolve().parent.parent
# Header, body and footer of a file.
PLACES = (0, 1000, -1)
GRACE = 1.5


@pytest.fixture
def store(tmp_path):
    """A folder with shards behind HTTP."""
    storage = Storage(str(tmp_path / "store"))
    manifest, infos, tokens = fill(storage)
    with FaultyStore(tmp_path / "store") as server:
        server.storage, server.manifest, server.infos, server.tokens = storage, manifest, infos, tokens
        yield server


def opener_of(store, cache, cache_bytes=10**9, seconds=20, fraction=0.0):
    return plain_opener(Storage(store.url), store.manifest, str(cache), cache_bytes, seconds, fraction)


def name_of(info):
    return Path(info.path).name


def flip(path, place):
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 4
    Path(path).write_bytes(content)


def files(folder, pattern="*"):
    return sorted(path.name for path in Path(folder).glob(pattern))


def reading(store, cache, cache_bytes=10**9, seconds=20, hold=""):
    """Start a process that reads all shards."""
    command = [sys.executable, "-m", "tests.shard_data", store.url, "data/abc", str(cache)]
    return subprocess.Popen(
        [*command, str(cache_bytes), str(seconds), hold],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process):
    """What that process has read, compared with what was written."""
    return json.loads(process.stdout.readline())


def ended(process):
    process.communicate(timeout=30)
    return process.returncode


def all_right(store, found):
    return found["shards"] == {path: digest(rows) for path, rows in store.tokens.items()}


def test_bits_that_flip_in_the_cache_between_processes_are_found_and_fetched_anew(store, tmp_path):
    first = reading(store, tmp_path / "cache")
    assert all_right(store, answer(first)) and ended(first) == 0
    for info, place in zip(store.infos, PLACES, strict=False):
        flip(tmp_path / "cache" / f"{info.digest}.arrow", place)
    truncated = tmp_path / "cache" / f"{store.infos[3].digest}.arrow"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    second = reading(store, tmp_path / "cache")
    found = answer(second)
    assert all_right(store, found) and ended(second) == 0
    assert found["statistics"]["damaged_copies"] == 4
    assert [store.requests[name_of(info)] for info in store.infos] == [2, 2, 2, 2, 1]


def test_bits_that_flip_while_the_process_runs_are_found_when_the_file_is_opened_again(store, tmp_path):
    opener = opener_of(store, tmp_path)
    path = opener(store.infos[0])
    opener.release(store.infos[0])
    flip(path, 1000)
    assert delivered(opener, store.infos, store.tokens) == {}
    assert opener.statistics()["damaged_copies"] == 1


@pytest.mark.parametrize("place", PLACES)
def test_damage_in_storage_is_fetched_again_then_quarantined_and_never_served(store, tmp_path, place):
    bad = store.infos[1]
    store.faults.flipped[name_of(bad)] = place
    opener = opener_of(store, tmp_path, fraction=0.2)
    errors = delivered(opener, store.infos, store.tokens)
    assert list(errors) == [bad.path]
    assert isinstance(errors[bad.path], QuarantinedShard) and errors[bad.path].path == bad.path
    assert f"shard {bad.path}" in str(errors[bad.path]) and "does not match its digest" in str(errors[bad.path])
    assert store.requests[name_of(bad)] == 2
    # Known from then on: neither fetched nor, should it be mended, served to some ranks and not to others.
    store.faults.flipped.clear()
    assert list(delivered(opener, store.infos, store.tokens)) == [bad.path] and store.requests[name_of(bad)] == 2
    assert opener.quarantined() == [bad.path]
    assert not list(tmp_path.glob(f"*{bad.digest}*"))
    again = opener_of(store, tmp_path, fraction=0.2)
    again.restore(shards_named(store.manifest, [bad.path]))
    assert list(delivered(again, store.infos, store.tokens)) == [bad.path]


def test_damage_on_the_way_is_mended_by_the_second_fetch(store, tmp_path):
    store.faults.answers = {name_of(info): deque(["flip"]) for info in store.infos}
    assert delivered(opener_of(store, tmp_path), store.infos, store.tokens) == {}
    assert all(store.requests[name_of(info)] == 2 for info in store.infos)


def test_more_damage_than_the_budget_ends_the_run_and_names_the_shards(store, tmp_path):
    for info in store.infos[:2]:
        store.faults.flipped[name_of(info)] = 500
    opener = opener_of(store, tmp_path, fraction=0.3)
    with pytest.raises(QuarantinedShard):
        opener(store.infos[0])
    with pytest.raises(DataError, match=r"240 of 600 tokens.*quarantine_fraction = 0\.3.*00000-000.*00001-000") as e:
        opener(store.infos[1])
    assert not isinstance(e.value, QuarantinedShard)


def test_a_shard_truncated_in_storage_is_quarantined(store, tmp_path):
    path = Path(store.storage.local_path(f"data/abc/{store.infos[2].path}"))
    path.write_bytes(path.read_bytes()[:-1])
    errors = delivered(opener_of(store, tmp_path, fraction=0.2), store.infos, store.tokens)
    assert list(errors) == [store.infos[2].path] and isinstance(errors[store.infos[2].path], QuarantinedShard)


def test_a_store_that_stumbles_is_asked_again(store, tmp_path):
    troubles = ["cut", 503, "stall", 429, "silent", "short", 500]
    for turn, info in enumerate(store.infos):
        store.faults.answers[name_of(info)] = deque(troubles[turn : turn + 3])
    started = time.monotonic()
    assert delivered(opener_of(store, tmp_path, seconds=3), store.infos, store.tokens) == {}
    assert time.monotonic() - started < 3 * len(store.infos)
    assert all(store.whole[name_of(info)] >= 1 for info in store.infos)


@pytest.mark.parametrize("trouble", [503, "stall", "silent", "cut"])
def test_a_store_that_never_answers_ends_in_a_typed_error_at_the_deadline(store, tmp_path, trouble):
    store.faults.always["*"] = trouble
    opener = opener_of(store, tmp_path, seconds=0.8)
    started = time.monotonic()
    with pytest.raises(
        FetchTimeout, match=r"shard shards/c/00000-000\.arrow: http://.*within 0\.8 s \(\d+ tries; last"
    ):
        opener(store.infos[0])
    assert 0.7 < time.monotonic() - started < 0.8 + GRACE
    assert files(tmp_path, ".tmp-*") == [] and files(tmp_path, ".lock-*") == []


def test_a_slow_store_is_waited_for_but_not_beyond_the_deadline(store, tmp_path):
    store.faults.bytes_per_second = 20_000
    assert delivered(opener_of(store, tmp_path / "a"), store.infos, store.tokens) == {}
    store.faults.bytes_per_second = 2_000
    started = time.monotonic()
    with pytest.raises(FetchTimeout):
        opener_of(store, tmp_path / "b", seconds=0.6)(store.infos[0])
    assert time.monotonic() - started < 0.6 + GRACE


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 kB: room for about three shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_full_disk_is_relieved_by_eviction_and_else_named(store, small_disk):
    opener = opener_of(store, small_disk)
    for turn in range(2):
        for info in store.infos:
            assert delivered(opener, [info], store.tokens) == {}, f"round {turn}"
            opener.release(info)
    assert opener.statistics()["evictions"] > 5
    assert 1 <= len(files(small_disk, "*.arrow")) < len(store.infos)
    # All that is there is leased: nothing can go, the next one cannot be kept.
    opener = opener_of(store, small_disk)
    with pytest.raises(
        DataError, match=r"the disk is full: shard .* needs 3122 bytes, \d+ are free.*data\.cache_bytes"
    ) as e:
        for info in store.infos:
            assert opener(info)
    assert str(small_disk) in str(e.value) and "TELAR_SHARD_CACHE" in str(e.value)
    assert files(small_disk, ".tmp-*") == [] and files(small_disk, ".lock-*") == []
    opener.close()
    assert delivered(opener_of(store, small_disk), store.infos[:2], store.tokens) == {}


def test_a_cache_folder_that_cannot_be_one_is_named(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"shard cache .*/file/cache: Not a directory.*TELAR_SHARD_CACHE"):
        opener_of(store, tmp_path / "file" / "cache")


def test_two_processes_on_one_folder_fetch_everything_once(store, tmp_path):
    store.faults.bytes_per_second = 30_000
    pair = [reading(store, tmp_path) for _ in range(2)]
    found = [answer(process) for process in pair]
    assert [ended(process) for process in pair] == [0, 0]
    assert all(all_right(store, one) for one in found)
    assert all(store.requests[name_of(info)] == 1 for info in store.infos)
    assert files(tmp_path, ".*") == []


def test_a_process_killed_while_it_fetches_leaves_nothing_in_the_way(store, tmp_path):
    store.faults.answers[name_of(store.infos[0])] = deque(["stall"])
    process = reading(store, tmp_path, seconds=60)
    deadline = Deadline(20)
    while not (files(tmp_path, ".tmp-*") and store.bytes[name_of(store.infos[0])]):
        assert deadline.left() > 0, "the process has not begun to fetch"
        time.sleep(0.02)
    process.kill()
    ended(process)
    assert files(tmp_path, ".tmp-*") and files(tmp_path, ".lock-*")
    started = time.monotonic()
    assert delivered(opener_of(store, tmp_path), store.infos, store.tokens) == {}
    assert time.monotonic() - started < 5 and files(tmp_path, ".*") == []


def test_leases_of_another_process_hold_until_it_dies(store, tmp_path):
    size = store.infos[0].bytes
    holder = reading(store, tmp_path, hold="hold")
    try:
        assert all_right(store, answer(holder))
        held = files(tmp_path, "*.arrow")
        assert len(held) == len(store.infos)
        extra = Storage(str(tmp_path / "more"))
        manifest, infos, tokens = fill(extra, 2, seed=1)
        with FaultyStore(tmp_path / "more") as more:
            opener = plain_opener(Storage(more.url), manifest, str(tmp_path), size, 20, 0.0)
            assert delivered(opener, infos[:1], tokens) == {}
            assert set(held) < set(files(tmp_path, "*.arrow")), "a leased file was evicted"
            assert opener.statistics()["over_budget_bytes"] == 5 * size
            holder.send_signal(signal.SIGKILL)
            ended(holder)
            opener.release(infos[0])
            assert delivered(opener, infos[1:], tokens) == {}
            assert files(tmp_path, "*.arrow") == [f"{infos[1].digest}.arrow"]
    finally:
        holder.kill()
        ended(holder)


def test_the_cache_stays_within_its_bytes_and_drops_what_is_needed_last(store, tmp_path):
    size = store.infos[0].bytes
    opener = opener_of(store, tmp_path, cache_bytes=3 * size)
    a, b, c, d, e = store.infos

    def use(info):
        assert delivered(opener, [info], store.tokens) == {}
        opener.release(info)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) <= 3 * size
        return {path.stem for path in tmp_path.glob("*.arrow")}

    # Nothing announced: the least recently used goes.
    assert [use(info) for info in (a, b, c, a, d)][-1] == {a.digest, c.digest, d.digest}
    # Announced (to the eviction alone, nothing is fetched ahead): the farthest goes, though it was used last.
    opener._uses.announce("reader", [a.digest, c.digest, d.digest])
    assert use(e) == {a.digest, c.digest, e.digest}


def test_an_evicted_file_stays_readable_for_whoever_has_mapped_it(store, tmp_path):
    import pyarrow as pa

    opener = opener_of(store, tmp_path, cache_bytes=1)
    table = pa.ipc.open_file(pa.memory_map(opener(store.infos[0]))).read_all()
    opener.release(store.infos[0])
    assert delivered(opener, store.infos[1:2], store.tokens) == {}
    assert files(tmp_path, "*.arrow") == [f"{store.infos[1].digest}.arrow"]
    assert table["target"].to_pylist() == [row[1] for row in store.tokens[store.infos[0].path]]


def test_open_files_do_not_grow_and_old_leases_end(store, tmp_path, monkeypatch):
    monkeypatch.setattr("data.opener.LEASES", 2)
    opener = opener_of(store, tmp_path)

    def held_open():
        targets = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
        return sum(target.startswith(str(tmp_path.resolve())) for target in targets)

    assert delivered(opener, store.infos, store.tokens) == {}
    before = held_open()
    for _ in range(50):
        for info in store.infos:
            opener(info)
    assert held_open() == before
    opener.close()
    assert held_open() == before - 2
    assert all(store.requests[name_of(info)] == 1 for info in store.infos)


def wait_for(condition, what):
    deadline = Deadline(20)
    while not condition():
        assert deadline.left() > 0, f"not within 20 s: {what}"
        time.sleep(0.01)


def test_announced_shards_come_in_order_and_push_out_nothing_that_is_needed_sooner(store, tmp_path):
    size = store.infos[0].bytes
    opener = opener_of(store, tmp_path, cache_bytes=3 * size)
    order = [store.infos[number] for number in (4, 2, 0, 3, 1)]
    opener.prefetch(order)
    wait_for(lambda: opener.statistics().get("prefetch_no_room"), "the cache is full")
    assert {path.stem for path in tmp_path.glob("*.arrow")} == {info.digest for info in order[:3]}
    assert sum(store.requests[name_of(info)] for info in order) == 3
    for number, info in enumerate(order):
        assert delivered(opener, [info], store.tokens) == {}
        opener.release(info)
        wanted = order[number + 1 : number + 3]
        wait_for(lambda wanted=wanted: all((tmp_path / f"{i.digest}.arrow").exists() for i in wanted), "the next two")
    assert all(store.requests[name_of(info)] == 1 for info in order), "a shard was evicted before its use"
    opener.close()


def test_bytes_in_flight_are_bounded(store, tmp_path, monkeypatch):
    store.faults.bytes_per_second = 60_000
    opener, now, most = opener_of(store, tmp_path), set(), []
    honest = opener._cache.path

    def path(shard, **options):
        now.add(shard.path)
        most.append(len(now))
        try:
            return honest(shard, **options)
        finally:
            now.discard(shard.path)

    monkeypatch.setattr(opener._cache, "path", path)
    opener._prefetcher = Prefetcher(opener._cache, opener._uses, 2 * store.infos[0].bytes)
    opener.prefetch(store.infos)
    wait_for(lambda: len(files(tmp_path, "*.arrow")) == len(store.infos), "all are fetched")
    assert max(most) == 2
    opener.close()


def test_a_shard_that_cannot_be_fetched_ahead_raises_where_it_is_asked_for(store, tmp_path):
    Path(store.storage.local_path(f"data/abc/{store.infos[0].path}")).unlink()
    opener = opener_of(store, tmp_path)
    opener.prefetch(store.infos)
    wait_for(lambda: opener.statistics().get("prefetch_failed"), "the missing shard was tried")
    errors = delivered(opener, store.infos, store.tokens)
    assert list(errors) == [store.infos[0].path] and "does not exist" in str(errors[store.infos[0].path])
    opener.close()


def test_threads_that_want_one_shard_fetch_it_once(store, tmp_path):
    store.faults.bytes_per_second = 30_000
    opener, found = opener_of(store, tmp_path), []
    threads = [threading.Thread(target=lambda: found.append(opener._cache.path(store.infos[0]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and store.requests[name_of(store.infos[0])] == 1


def test_local_shards_are_verified_in_place_and_never_copied_or_removed(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    manifest, infos, tokens = fill(storage)
    opener = plain_opener(storage, manifest, str(tmp_path / "cache"), 1, 20, 0.9)
    assert delivered(opener, infos, tokens) == {}
    assert opener(infos[0]) == storage.local_path(f"data/abc/{infos[0].path}")
    assert not list((tmp_path / "cache").glob("*.arrow"))
    for info, place in zip(infos, PLACES, strict=False):
        flip(storage.local_path(f"data/abc/{info.path}"), place)
    # Found in this process, though it had verified them, and in the next one.
    for one in (opener, plain_opener(storage, manifest, str(tmp_path / "cache"), 1, 20, 0.9)):
        errors = delivered(one, infos, tokens)
        assert list(errors) == [info.path for info in infos[:3]]
        assert all(isinstance(error, QuarantinedShard) for error in errors.values())
    assert all(Path(storage.local_path(f"data/abc/{info.path}")).exists() for info in infos)
    storage.remove(f"data/abc/{infos[4].path}")
    with pytest.raises(DataError, match=r"shard shards/c/00004-000\.arrow: .*does not exist; run the prepare"):
        opener(infos[4])


def test_a_lock_is_exclusive_and_times_out(tmp_path):
    path = tmp_path / "lock"
    with exclusive(path, Deadline(1)):
        assert is_held(path)
        with pytest.raises(TimeoutError), exclusive(path, Deadline(0.05)):
            pass
    assert not is_held(path) and not path.exists()


def test_many_threads_hold_a_lock_one_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with exclusive(tmp_path / "lock", Deadline(20)):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and max(most) == 1 and files(tmp_path) == []


def shard(path, tokens):
    return ShardInfo(path, 1, tokens // 2, tokens - tokens // 2, 1, "0")


def test_the_quarantine_counts_tokens_once_and_its_state_can_be_restored():
    quarantine = Quarantine(1000, 0.02)
    error = quarantine.add(shard("a", 11), "bad")
    quarantine.add(shard("a", 11), "bad again")
    assert quarantine.tokens == 11 and "a" in quarantine and "b" not in quarantine
    copied = pickle.loads(pickle.dumps(error))
    assert isinstance(copied, QuarantinedShard) and copied.path == "a" and str(copied) == str(error)
    quarantine.add(shard("b", 9), "bad")
    assert json.loads(json.dumps(quarantine.state())) == ["a", "b"]
    with pytest.raises(DataError, match=r"bad\. Damaged shards now hold 21 of 1000 tokens.*0\.02 allows: a, b, c"):
        quarantine.add(shard("c", 1), "bad")
    restored = Quarantine(1000, 0.02)
    restored.restore([shard("a", 11), shard("b", 9)])
    assert restored.state() == ["a", "b"]
    with pytest.raises(DataError, match="quarantine_fraction"):
        Quarantine(1000, 0.01).restore([shard("a", 11)])


def test_a_state_that_names_an_unknown_shard_is_refused(tmp_path):
    manifest, infos, _ = fill(Storage(str(tmp_path)))
    assert shards_named(manifest, []) == [] and shards_named(manifest, [infos[3].path]) == [infos[3]]
    with pytest.raises(DataError, match="no shard 'shards/none'"):
        shards_named(manifest, [infos[3].path, "shards/none"])
