"""Shard servers on a cluster of two nodes: storage is read once, and whatever dies, every delivered token is right."""

import os
import signal
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Storage
from configs.errors import DataError
from configs.load import parse_config
from data.coordinator import Directory, Source
from data.fetch import Deadline
from data.prepare import prepare, ray_tasks
from data.quarantine import QuarantinedShard
from data.runners import serial
from data.shard_server import ServerOpener, shard_opener, start_servers, stop_servers
from data.shards import ShardReader, write_shard
from jobs.codebook import ensure_codebook
from tests.faulty_store import FaultyStore
from tests.shard_data import delivered, fill
from tests.test_data_prepare import files_below, make_config, write_code
from tests.test_text_to_image import tree, write_squares


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


def test_a_file_that_is_no_arrow_file_is_named(tmp_path):
    storage = Storage(str(tmp_path))
    _, infos, _ = fill(storage)
    storage.write_bytes("junk", b"junk" * 100)
    with pytest.raises(DataError, match=r"shard shards/c/00000-000\.arrow: .*is no Arrow file"):
        ShardReader(storage.local_path("junk"), infos[0])


def test_the_first_node_that_asks_fetches_and_the_others_copy_in_turn():
    directory = Directory()
    directory.join("a", ["x"])
    assert directory.ask("x", "b") == Source("copy", "a") and directory.ask("y", "a") == Source("storage")
    assert directory.ask("y", "a") == Source("storage") and directory.ask("y", "b") == Source("wait", "a")
    directory.done("y", "b", True)
    assert directory.ask("y", "c") == Source("copy", "b"), "who has it, has it, whoever claimed it"
    directory.done("y", "a", True)
    assert {directory.ask("y", "c").node for _ in range(2)} == {"a", "b"}
    directory.forget("a")
    assert directory.ask("x", "b") == Source("storage") and directory.ask("y", "c") == Source("copy", "b")
    directory.lost("y", "b")
    assert directory.ask("y", "c") == Source("storage") and directory.ask("y", "b") == Source("wait", "c")
    directory.done("y", "c", False)
    assert directory.ask("y", "b") == Source("storage")
    directory.forget("b")
    assert directory.ask("y", "c") == Source("storage"), "a claim ends with the node that made it"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine; this process is connected to them."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    limits = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**limits, "include_dashboard": False})
    cluster.add_node(**limits)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def ray_cluster(cluster):
    """The module, connected to the cluster."""
    return pytest.importorskip("ray")


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
def test_ray_tasks_train_the_codebook_and_write_the_same_pictures(tmp_path, ray_cluster):
    write_squares(tmp_path)
    sections = tree(tmp_path)
    sections["images"]["steps"] = 5
    config, stores = parse_config(sections, "test"), []
    for name, runner in (("a", serial), ("b", ray_tasks(2))):
        stores.append(Storage(str(tmp_path / name)))
        encode_image = ensure_codebook(config, stores[-1], runner, lambda line: None)
        prepare(config, stores[-1], runner, lambda line: None, encode_image)
    one, other = map(files_below, stores)
    assert one == other and any("codebooks" in file for file in one)


class Two:
    """Servers of two nodes with a cache folder each, and an opener as a rank on each node would have."""

    def __init__(self, ray, tmp_path, store, label, seconds=30, fraction=0.0, cache_bytes=10**9, quarantined=()):
        self.ray, self.folder, self.label = ray, tmp_path / "caches", label
        config = make_config(tmp_path)
        data = config.data.model_copy(
            update={
                "fetch_timeout_seconds": seconds,
                "quarantine_fraction": fraction,
                "cache_bytes": cache_bytes,
            }
        )
        self.servers = start_servers(
            config.model_copy(update={"data": data}),
            Storage(store.url),
            store.manifest,
            label,
            lambda node: str(self.folder / node),
            quarantined,
        )
        self.nodes = list(self.servers.by_node)
        self.openers = [self.opener(number) for number in range(2)]

    def opener(self, number):
        node = self.nodes[number]
        return ServerOpener(self.servers.by_node[node], self.servers.settings, self.servers.folders[node])

    def copy(self, number, info):
        return self.folder / self.nodes[number] / f"{info.digest}.arrow"

    def server(self, number):
        return self.servers.by_node[self.nodes[number]]

    def kill(self, number):
        """The actor's process dies as by lack of memory; Ray starts it again."""
        os.kill(self.ray.get(self.server(number).pid.remote()), signal.SIGKILL)

    def statistics(self):
        return self.ray.get(self.servers.coordinator.statistics.remote())


@pytest.fixture
def store(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    manifest, infos, tokens = fill(storage, 12)
    with FaultyStore(tmp_path / "store") as server:
        server.storage, server.manifest, server.infos, server.tokens = storage, manifest, infos, tokens
        yield server


@pytest.fixture
def two(ray_cluster, tmp_path, store, request):
    started = []

    def start(**options):
        label = f"test/{request.node.name}-{len(started)}"
        started.append(Two(ray_cluster, tmp_path, store, label, **options))
        return started[-1]

    yield start
    for one in started:
        for opener in one.openers:
            opener.close()
        stop_servers(one.servers)


def requests_of(store, infos):
    return [store.requests[Path(info.path).name] for info in infos]


def in_threads(*work):
    """Run functions at the same time; raises what any of them raised."""
    errors = []

    def guarded(function):
        try:
            function()
        # Raised again where the test can see it.
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a reader hangs"
    if errors:
        raise errors[0]


@pytest.mark.ray
def test_two_nodes_read_storage_once(two, store):
    pair = two()
    for opener in pair.openers:
        opener.prefetch(store.infos)
    backward = list(reversed(store.infos))
    in_threads(
        lambda: delivered(pair.openers[0], store.infos, store.tokens) == {} or pytest.fail("errors"),
        lambda: delivered(pair.openers[1], backward, store.tokens) == {} or pytest.fail("errors"),
    )
    assert requests_of(store, store.infos) == [1] * len(store.infos)
    total = sum(info.bytes for info in store.infos)
    assert sum(store.bytes[Path(info.path).name] for info in store.infos) == total
    found = pair.statistics()
    assert found["storage_bytes"] == total and found["peer_bytes"] == total and found["nodes"] == 2
    assert found["quarantined"] == 0 and found["misses"] == 2 * len(store.infos)
    # The next attempt finds the copies, and reads storage no more even where one node has lost its own.
    stop_servers(pair.servers)
    for info in store.infos:
        pair.copy(0, info).unlink()
    again = two()
    assert delivered(again.openers[0], store.infos, store.tokens) == {}
    assert requests_of(store, store.infos) == [1] * len(store.infos)


@pytest.mark.ray
@pytest.mark.slow
def test_a_damaged_copy_of_another_node_is_not_taken(two, store):
    pair = two()
    assert delivered(pair.openers[0], store.infos, store.tokens) == {}
    stop_servers(pair.servers)
    for info, place in zip(store.infos, (0, 1000, -1), strict=False):
        content = bytearray(pair.copy(0, info).read_bytes())
        content[place] ^= 1
        pair.copy(0, info).write_bytes(content)
    again = two()
    assert delivered(again.openers[1], store.infos, store.tokens) == {}
    assert delivered(again.openers[0], store.infos, store.tokens) == {}
    assert requests_of(store, store.infos) == [2, 2, 2, *[1] * (len(store.infos) - 3)]


@pytest.mark.ray
@pytest.mark.slow
def test_damage_in_storage_is_quarantined_once_for_all_nodes(two, store):
    bad = store.infos[4]
    store.faults.flipped[Path(bad.path).name] = -1
    pair = two(fraction=0.1)
    for opener in pair.openers:
        opener.prefetch(store.infos)
        errors = delivered(opener, store.infos, store.tokens)
        assert list(errors) == [bad.path] and isinstance(errors[bad.path], QuarantinedShard)
        assert opener.quarantined() == [bad.path]
    assert requests_of(store, [bad]) == [2]
    assert pair.statistics()["quarantined"] == 1
    # An attempt that starts from the run's state asks no more for it.
    again = two(fraction=0.1, quarantined=[bad.path])
    assert list(delivered(again.openers[0], store.infos, store.tokens)) == [bad.path]
    assert requests_of(store, [bad]) == [2]
    with pytest.raises(DataError, match=r"quarantine_fraction = 0\.01"):
        two(fraction=0.01, quarantined=[bad.path])


@pytest.mark.ray
@pytest.mark.slow
def test_a_copy_on_another_node_saves_a_shard_that_is_damaged_in_storage(two, store):
    pair = two()
    assert delivered(pair.openers[0], store.infos[:1], store.tokens) == {}
    store.faults.flipped[Path(store.infos[0].path).name] = 0
    assert delivered(pair.openers[1], store.infos[:1], store.tokens) == {}
    assert requests_of(store, store.infos[:1]) == [1]


@pytest.mark.ray
@pytest.mark.slow
def test_a_rank_without_its_server_does_not_quarantine_what_another_node_has(two, store):
    pair, first = two(fraction=0.5), store.infos[:1]
    assert delivered(pair.openers[1], first, store.tokens) == {}
    store.faults.flipped[Path(first[0].path).name] = 0
    pair.kill(0)
    assert delivered(pair.openers[0], first, store.tokens) == {}
    assert pair.openers[0].quarantined() == [] and pair.statistics()["quarantined"] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_damage_beyond_the_budget_reaches_the_rank_as_it_is(two, store):
    store.faults.flipped[Path(store.infos[0].path).name] = 0
    with pytest.raises(DataError, match=r"quarantine_fraction = 0 allows: shards/c/00000-000\.arrow") as e:
        two().openers[0](store.infos[0])
    assert not isinstance(e.value, QuarantinedShard)


@pytest.mark.ray
def test_an_actor_killed_while_its_node_reads_does_no_harm_and_is_used_again(two, store):
    pair = two()
    store.faults.bytes_per_second = 15_000
    pair.openers[0].prefetch(store.infos)
    started, killed = time.monotonic(), threading.Event()

    def kill():
        deadline = Deadline(20)
        while sum(requests_of(store, store.infos)) < 3:
            assert deadline.left() > 0
            time.sleep(0.01)
        pair.kill(0)
        killed.set()

    in_threads(kill, lambda: delivered(pair.openers[0], store.infos, store.tokens) == {} or pytest.fail("errors"))
    assert killed.is_set() and time.monotonic() - started < 30
    assert pair.openers[0].statistics()["server_failures"] >= 1, "the rank never fell back to its own fetching"
    store.faults.bytes_per_second = 0
    # The new actor serves: what is evicted now comes through it, and from the other node's copies.
    deadline = Deadline(30)
    while True:
        pair.copy(0, store.infos[0]).unlink(missing_ok=True)
        assert delivered(pair.openers[0], store.infos[:1], store.tokens) == {}
        if pair.ray.get(pair.server(0).statistics.remote()).get("misses", 0) >= 1:
            break
        assert deadline.left() > 0, "the rank does not return to the server"


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_of_a_fetch_is_replaced_by_the_next(two, store):
    pair, first = two(), store.infos[:1]
    store.faults.answers[Path(first[0].path).name] = deque(["silent"])

    def claim():
        # This rank's call fails with its server; it then fetches by itself.
        assert delivered(pair.openers[0], first, store.tokens) == {}

    def follow():
        deadline = Deadline(20)
        while not requests_of(store, first)[0]:
            assert deadline.left() > 0
            time.sleep(0.01)
        killer = threading.Timer(0.3, pair.kill, (0,))
        killer.start()
        started = time.monotonic()
        assert delivered(pair.openers[1], first, store.tokens) == {}
        assert time.monotonic() - started < 15
        killer.join()

    in_threads(claim, follow)


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_is_lost_in_the_middle_of_a_fetch_is_replaced_by_the_next(two, store, cluster):
    machine = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    trio, info = two(), store.infos[0]
    assert len(trio.nodes) == 3
    lost = trio.nodes.index(machine.node_id)
    store.faults.answers[Path(info.path).name] = deque(["silent"])
    trio.server(lost).path.remote(info)
    deadline = Deadline(20)
    while not requests_of(store, [info])[0]:
        assert deadline.left() > 0
        time.sleep(0.01)
    cluster.remove_node(machine, allow_graceful=False)
    other = next(number for number in range(3) if number != lost)
    started = time.monotonic()
    opener = trio.opener(other)
    trio.openers.append(opener)
    assert delivered(opener, store.infos, store.tokens) == {}
    assert time.monotonic() - started < 20
    assert opener.statistics().get("server_failures", 0) == 0, "the rank gave up its own server"
    assert requests_of(store, store.infos) == [2, *[1] * (len(store.infos) - 1)]


@pytest.mark.ray
@pytest.mark.slow
def test_without_the_coordinator_every_node_fetches_for_itself(two, store):
    pair = two()
    assert delivered(pair.openers[0], store.infos[:2], store.tokens) == {}
    pair.ray.kill(pair.servers.coordinator)
    for opener in pair.openers:
        assert delivered(opener, store.infos, store.tokens) == {}
    assert requests_of(store, store.infos) == [2] * len(store.infos)


@pytest.mark.ray
@pytest.mark.slow
def test_a_coordinator_that_is_started_again_learns_who_has_what(two, store):
    pair = two(fraction=0.1)
    bad = store.infos[0]
    store.faults.flipped[Path(bad.path).name] = 0
    assert list(delivered(pair.openers[0], store.infos[:6], store.tokens)) == [bad.path]
    pair.ray.kill(pair.servers.coordinator, no_restart=False)
    deadline = Deadline(40)
    while True:
        for opener in pair.openers:
            # Whoever needs a shard tells the new coordinator what it has, and what is quarantined.
            for number in range(2):
                pair.copy(number, store.infos[1]).unlink(missing_ok=True)
            assert delivered(opener, store.infos[1:2], store.tokens) == {}
        try:
            if pair.statistics()["nodes"] == 2:
                break
        except pair.ray.exceptions.RayActorError:
            assert deadline.left() > 0, "the coordinator does not come back"
        assert deadline.left() > 0, "the nodes do not join again"
    before = requests_of(store, store.infos)
    assert list(delivered(pair.openers[1], store.infos[:6], store.tokens)) == [bad.path]
    assert requests_of(store, store.infos) == before and before[0] == 2


@pytest.mark.ray
@pytest.mark.slow
def test_the_deadline_holds_through_the_server(two, store):
    pair = two(seconds=1)
    store.faults.always["*"] = "silent"
    started = time.monotonic()
    with pytest.raises(DataError, match=r"shard shards/c/00000-000\.arrow: http.*within .* s"):
        pair.openers[0](store.infos[0])
    assert time.monotonic() - started < 1 + 1.5


@pytest.mark.ray
def test_servers_hand_out_local_files_in_place_and_name_what_is_damaged(tmp_path, ray_cluster):
    storage = Storage(str(tmp_path / "store"))
    manifest, infos, tokens = fill(storage)
    path = Path(storage.local_path(f"data/abc/{infos[1].path}"))
    content = bytearray(path.read_bytes())
    content[300] ^= 4
    path.write_bytes(content)
    servers = start_servers(make_config(tmp_path), storage, manifest, "test/local-1")
    try:
        opener = shard_opener(servers)
        opener.prefetch(infos)
        assert opener(infos[0]) == storage.local_path(f"data/abc/{infos[0].path}")
        for _ in range(2):
            errors = delivered(opener, infos, tokens)
            assert list(errors) == [infos[1].path]
            assert "does not match its digest" in str(errors[infos[1].path])
    finally:
        stop_servers(servers)
    with FaultyStore(tmp_path / "store") as remote, pytest.raises(DataError, match=r"shard cache .*: Not a directory"):
        start_servers(make_config(tmp_path), Storage(remote.url), manifest, "test/local-3", lambda _: f"{path}/cache")
    storage.remove("data/abc/manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        start_servers(make_config(tmp_path), storage, manifest, "test/local-2")
    stop_servers(None)
