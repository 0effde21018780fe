"""Storage: whole objects or none, create-if-absent, nothing outside the root; local and memory:// stores."""

import multiprocessing
import uuid
from pathlib import Path

import pytest

from cluster.storage import SpooledText, Storage
from configs.errors import ConfigError, StorageError


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    if request.param == "local":
        yield Storage(str(tmp_path / "store"))
        return
    store = Storage(f"memory://telar-{uuid.uuid4().hex}")
    yield store
    store.remove()


def test_objects_are_written_read_listed_and_removed(storage):
    storage.write_text("a/b.txt", "one")
    storage.write_bytes("a/c.bin", b"\x00\x01")
    storage.write_text("a/b.txt", "two")
    assert storage.read_text("a/b.txt") == "two"
    assert storage.size("a/c.bin") == 2
    assert storage.names("a") == ["b.txt", "c.bin"]
    assert storage.child("a").read_bytes("c.bin") == b"\x00\x01"
    assert storage.names("absent") == []
    storage.remove("a")
    assert not storage.exists("a/b.txt")
    storage.remove("a")


def test_a_write_that_fails_leaves_the_old_object(storage):
    storage.write_text("x", "old")
    with pytest.raises(RuntimeError, match="halfway"), storage.open("x", "wb") as file:
        file.write(b"new")
        raise RuntimeError("halfway")
    assert storage.read_text("x") == "old"
    assert storage.names() == ["x"]


def test_create_never_replaces(storage):
    assert storage.create("marker", b"first")
    assert not storage.create("marker", b"second")
    assert storage.read_bytes("marker") == b"first"


def _create(url, content, results):
    results.put(Storage(url).create("marker", content))


def test_only_one_of_many_processes_creates(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_create, args=(str(tmp_path), str(number).encode(), results)) for number in range(8)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_paths_stay_inside(storage):
    with pytest.raises(ValueError, match="leaves its storage"):
        storage.write_text("../outside", "x")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"cannot write .*file/run/x.*--storage or run.storage"):
        Storage(str(tmp_path / "file" / "run")).write_text("x", "y")


def test_an_unknown_protocol_is_named():
    with pytest.raises(ConfigError, match="no file system for 'nosuch'"):
        Storage("nosuch://bucket/runs")


def test_spooled_text_grows_and_keeps_what_was_there(storage):
    for part in ("first", "second"):
        text = SpooledText(storage, "log", flush_seconds=1e9)
        text.append(part)
        text.close()
    assert storage.read_text("log") == "first\nsecond\n"


def test_spooled_text_reaches_the_store_at_each_interval(storage):
    text = SpooledText(storage, "log", flush_seconds=0.0)
    text.append("now")
    assert storage.read_text("log") == "now\n"
    text.close()


def test_relative_local_storage_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Storage("runs")
    assert store.url == str(tmp_path.resolve() / "runs")
    assert store.local_path("a") == str(Path(store.url) / "a")
