"""Fetching: which errors are tried again, how long the waits are, and that the deadline holds. No test waits."""

import errno
import threading
import time
from types import SimpleNamespace

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import Storage
from configs.errors import DataError
from data import fetch
from data.fetch import DamagedShard, Deadline, FetchTimeout, StorageFetch, backoff_seconds, classify
from tests.shard_data import fill


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Status(Exception):
    """As aiohttp's ClientResponseError: a status code, no OSError."""

    def __init__(self, status):
        super().__init__(f"answer {status}")
        self.status = status


@pytest.fixture
def remote():
    storage = Storage("memory://fetch-test")
    yield storage
    storage.remove()


@pytest.fixture
def one(remote, tmp_path, monkeypatch):
    """A shard, a fetch of it with a false clock, and a list of errors that opening it raises first."""
    _, infos, _ = fill(remote, 1)
    clock, errors, opened = Clock(), [], []
    puller = StorageFetch(remote.child("data/abc"), clock, clock.sleep)
    honest = puller._fs.open

    def flaky(path, mode="rb"):
        opened.append(path)
        if errors:
            raise errors.pop(0)
        return honest(path, mode)

    monkeypatch.setattr(puller._fs, "open", flaky)
    content = remote.read_bytes(f"data/abc/{infos[0].path}")
    return SimpleNamespace(
        shard=infos[0], fetch=puller, clock=clock, errors=errors, opened=opened, target=tmp_path / "t", content=content
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("x"), "permanent"),
        (PermissionError("x"), "permanent"),
        (Status(403), "permanent"),
        (Status(404), "permanent"),
        (Status(429), "transient"),
        (Status(500), "transient"),
        (Status(503), "transient"),
        (ConnectionResetError("x"), "transient"),
        (TimeoutError("x"), "transient"),
        (OSError(errno.EIO, "x"), "transient"),
        (OSError(errno.ENOSPC, "x"), "disk"),
        (ZeroDivisionError("x"), "unknown"),
    ],
)
def test_errors_are_classified(error, kind):
    assert classify(error) == kind


def test_errors_of_http_clients_are_transient():
    import aiohttp

    assert classify(aiohttp.ClientPayloadError("cut")) == "transient"
    assert classify(aiohttp.ServerDisconnectedError()) == "transient"


@given(st.integers(0, 100), st.floats(0, 1, exclude_max=True))
def test_back_off_is_jittered_within_a_growing_bound(failures, drawn):
    bound = min(fetch.MOST_BACKOFF_SECONDS, fetch.FIRST_BACKOFF_SECONDS * 2.0**failures)
    assert 0 <= backoff_seconds(failures, lambda: drawn) <= bound
    assert backoff_seconds(failures, lambda: 1.0) == bound


def test_lost_connections_are_tried_again_and_the_content_is_whole(one):
    one.errors += [ConnectionResetError("gone"), Status(503), TimeoutError("slow"), Status(429)]
    one.fetch(one.shard, one.target, Deadline(1000, one.clock))
    assert one.target.read_bytes() == one.content
    assert len(one.opened) == 5 and len(one.clock.slept) == 4


def test_the_deadline_ends_it_and_everything_is_named(one):
    one.errors += [ConnectionResetError(f"gone {number}") for number in range(1000)]
    with pytest.raises(
        FetchTimeout, match=r"shard shards/c/00000-000\.arrow: memory://.*within 60 s \((\d+) tries;"
    ) as e:
        one.fetch(one.shard, one.target, Deadline(60, one.clock))
    assert f"ConnectionResetError: gone {len(one.opened) - 1}" in str(e.value)
    assert "data.fetch_timeout_seconds" in str(e.value)
    assert one.clock.now == pytest.approx(160) and sum(one.clock.slept) == pytest.approx(60)


@pytest.mark.parametrize(
    ("error", "match"),
    [(FileNotFoundError("x"), "does not exist; run the prepare"), (Status(403), "may not be read .*check the credent")],
)
def test_permanent_errors_are_not_tried_again(one, error, match):
    one.errors.append(error)
    with pytest.raises(DataError, match=match):
        one.fetch(one.shard, one.target, Deadline(1000, one.clock))
    assert len(one.opened) == 1 and one.clock.slept == []


def test_a_mistake_of_the_program_is_no_error_of_the_store(one):
    one.errors.append(ZeroDivisionError("mistake"))
    with pytest.raises(ZeroDivisionError, match="mistake"):
        one.fetch(one.shard, one.target, Deadline(1000, one.clock))


def test_damage_is_told_after_one_more_fetch(one, remote):
    name = f"data/abc/{one.shard.path}"
    remote.write_bytes(name, b"?" + one.content[1:])
    one.opened.clear()
    with pytest.raises(DamagedShard, match="does not match its digest"):
        one.fetch(one.shard, one.target, Deadline(1000, one.clock))
    assert len(one.opened) == 2


class Stuck(fsspec.AbstractFileSystem):
    """A store with a blocking client: the first reads hang in the middle of the file until the test lets go."""

    protocol = "stuck"
    go = threading.Event()
    hangs = 1
    late = None

    def open(self, path, mode="rb"):
        content = fsspec.filesystem("memory").cat_file(path.removeprefix("stuck://"))
        stuck, Stuck.hangs = Stuck.hangs > 0, Stuck.hangs - 1
        return _StuckFile(content, stuck)


class _StuckFile:
    def __init__(self, content, stuck):
        self._pieces = [content[:100], b"X" * 50 if stuck else content[100:], b""]
        self._stuck = stuck

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, _):
        piece = self._pieces.pop(0)
        if self._stuck and len(self._pieces) == 1:
            Stuck.go.wait()
        return piece


def test_a_blocking_client_that_hangs_is_left_behind_and_can_spoil_nothing(remote, tmp_path):
    _, infos, _ = fill(remote, 1)
    fsspec.register_implementation("stuck", Stuck, clobber=True)
    puller, target = StorageFetch(remote.child("data/abc")), tmp_path / "t"
    puller._fs, Stuck.hangs = Stuck(), 1
    started = time.monotonic()
    puller(infos[0], target, Deadline(1.0))
    assert time.monotonic() - started < 3
    content = remote.read_bytes(f"data/abc/{infos[0].path}")
    assert target.read_bytes() == content
    Stuck.go.set()
    for thread in threading.enumerate():
        if thread.name == "telar-fetch":
            thread.join(10)
    assert target.read_bytes() == content
    Stuck.go.clear()
    Stuck.hangs = 1000
    started = time.monotonic()
    with pytest.raises(FetchTimeout, match=r"100 of \d+ bytes after"):
        puller(infos[0], target, Deadline(0.4))
    assert time.monotonic() - started < 3
    Stuck.go.set()
