"""Shards of local storage are hashed once per machine, not once per process, and again when they have changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.storage import Storage
from data import verified
from data.opener import plain_opener
from data.quarantine import QuarantinedShard
from data.shard_cache import VERIFIED
from data.verified import VerifiedFiles
from tests.shard_data import fill

ROOT = Path(__file__).resolve().parent.parent
OPEN_AND_READ = """
import sys
from cluster.storage import Storage
from data import verified
from data.manifest import Manifest
from data.opener import plain_opener
from data.shards import ShardReader

verified.SETTLED_SECONDS = 0.0
url, cache = sys.argv[1:]
manifest = Manifest.read(Storage(url), "data/abc")
opener = plain_opener(Storage(url), manifest, cache)

def read_bytes():
    # rchar: bytes asked of read(2); what is read through a memory map does not count.
    return int(dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())["rchar"])

before = read_bytes()
tokens = sum(len(ShardReader(opener(info), info).row(0)[2]) for info in manifest.corpora[0].shards)
print(read_bytes() - before, tokens)
"""


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once, so that no test waits."""
    monkeypatch.setattr(verified, "SETTLED_SECONDS", 0.0)


def read_in_new_process(storage, cache):
    command = [sys.executable, "-c", OPEN_AND_READ, storage.url, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    hashed, tokens = map(int, done.stdout.split())
    return hashed, tokens


def test_the_next_process_hashes_no_shard_again(tmp_path):
    storage = Storage(str(tmp_path / "store"))
    _, infos, _ = fill(storage, rows=2000)
    size = sum(info.bytes for info in infos)
    first, tokens = read_in_new_process(storage, tmp_path / "cache")
    again, same = read_in_new_process(storage, tmp_path / "cache")
    elsewhere, _ = read_in_new_process(storage, tmp_path / "other-cache")
    assert tokens == same == 5 * len(infos)
    # Each process reads its modules besides, and the list.
    assert first - again > 0.99 * size and elsewhere - again > 0.99 * size


def test_a_file_that_was_changed_is_hashed_again_whatever_its_name_size_and_time_say(tmp_path, settled):
    storage = Storage(str(tmp_path / "store"))
    manifest, infos, _ = fill(storage)
    path = plain_opener(storage, manifest, str(tmp_path / "cache"), quarantine_fraction=0.9)(infos[0])
    assert (tmp_path / "cache" / VERIFIED).read_text().split()[0] == infos[0].digest
    before = Path(path).stat()
    content = bytearray(Path(path).read_bytes())
    content[1000] ^= 1
    Path(path).write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = Path(path).stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    with pytest.raises(QuarantinedShard, match="does not match its digest"):
        plain_opener(storage, manifest, str(tmp_path / "cache"), quarantine_fraction=0.9)(infos[0])


def test_a_file_that_changed_a_moment_ago_is_not_noted(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    VerifiedFiles(tmp_path / "list").add("d", file.stat())
    assert not VerifiedFiles(tmp_path / "list").knows("d", file.stat()) and not (tmp_path / "list").exists()


def test_what_one_process_notes_others_see_and_torn_lines_are_nothing(tmp_path, settled):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(file.name)
    one, other = (VerifiedFiles(tmp_path / "list") for _ in range(2))
    assert not other.knows("a", files[0].stat())
    one.add("a", files[0].stat())
    assert other.knows("a", files[0].stat())
    assert not other.knows("b", files[0].stat()) and not other.knows("a", files[1].stat())
    with (tmp_path / "list").open("ab") as torn:
        torn.write(b"b 12 \xff 3")
    one.add("b", files[1].stat())
    assert other.knows("b", files[1].stat()) and VerifiedFiles(tmp_path / "list").knows("b", files[1].stat())


def test_a_list_that_has_grown_too_long_is_begun_anew(tmp_path, monkeypatch, settled):
    monkeypatch.setattr(verified, "MOST_BYTES", 100)
    file = tmp_path / "file"
    file.write_text("x")
    noted = VerifiedFiles(tmp_path / "list")
    for number in range(9):
        noted.add(f"digest-{number}", file.stat())
    assert (tmp_path / "list").stat().st_size < 300
    assert VerifiedFiles(tmp_path / "list").knows("digest-8", file.stat())


def test_where_the_list_cannot_be_written_the_log_says_so_once(tmp_path, caplog, settled):
    (tmp_path / "file").write_text("x")
    state = (tmp_path / "file").stat()
    noted = VerifiedFiles(tmp_path / "file" / "list")
    noted.add("a", state)
    noted.add("b", state)
    assert [record.getMessage().count("each process hashes its shards anew") for record in caplog.records] == [1]
    assert not VerifiedFiles(tmp_path / "file" / "list").knows("a", state)
