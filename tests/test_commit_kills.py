"""The commit protocol, cut off by SIGKILL at every single thing that it does to the file system."""

import json
import os
import signal
import sys

import xxhash

from cluster import commit
from cluster.commit import CheckpointError, RankFile
from cluster.storage import Storage

OLD, NEW, LATER = 10, 20, 30
# What changes or reads a file; each is a point to be killed at.
TOUCHES = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


def content(step, attempt, rank):
    return f"state of step {step}, attempt {attempt}, rank {rank}. ".encode() * 50


def write_and_commit(checkpoints, step, attempt, keep=2):
    """What two ranks and a controller do for a checkpoint."""
    files = []
    for rank in range(2):
        data = content(step, attempt, rank)
        name = commit.rank_file_name(rank)
        with checkpoints.open(f"{commit.attempt_folder(step, attempt)}/{name}", "wb") as file:
            for start in range(0, len(data), 1000):
                file.write(data[start : start + 1000])
        files.append(RankFile(rank, name, len(data), xxhash.xxh3_128_hexdigest(data)))
    commit.commit(checkpoints, step, attempt, files, 2, {})
    commit.prune(checkpoints, keep)


def killed_at(folder, point):
    """Whether a child that commits NEW and removes OLD was killed at that point, and not finished before."""
    child = os.fork()
    if child == 0:
        left = point

        def count(event, arguments):
            nonlocal left
            if event in TOUCHES and arguments and str(arguments[0]).startswith(str(folder)):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            write_and_commit(Storage(str(folder)), NEW, 1, keep=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def intact(checkpoints, committed):
    folder = committed.folder
    return all(
        checkpoints.read_bytes(f"{folder}/{file['path']}") == content(committed.step, committed.attempt, file["rank"])
        for file in committed.manifest["files"]
    )


def test_a_kill_anywhere_leaves_a_valid_step_and_nothing_that_stays(tmp_path):
    found, point = [], 0
    while True:
        folder = tmp_path / f"killed-at-{point}"
        checkpoints = Storage(str(folder))
        write_and_commit(checkpoints, OLD, 1)
        if not killed_at(folder, point):
            break
        latest, damaged = commit.latest(checkpoints)
        assert latest is not None and damaged == [] and intact(checkpoints, latest), point
        # Nothing without COMMIT is ever taken for a checkpoint.
        for step in (OLD, NEW):
            if not (folder / commit.step_folder(step) / "COMMIT").exists():
                try:
                    commit.read_commit(checkpoints, step)
                except CheckpointError:
                    continue
                raise AssertionError(f"step {step} is read without COMMIT after a kill at {point}")
        found.append(latest.step)
        if latest.step == OLD:
            write_and_commit(checkpoints, NEW, 2)
            assert commit.latest(checkpoints)[0].attempt == 2
        write_and_commit(checkpoints, LATER, 2, keep=1)
        # What attempts left behind is collected, files under temporary names too.
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        step = commit.step_folder(LATER)
        parts = [f"attempt-002/{name}" for name in ("MANIFEST.json", *map(commit.rank_file_name, range(2)))]
        assert left == sorted(f"{step}/{name}" for name in ("COMMIT", *parts)), point
        point += 1
    # Kills came before the commit and behind it, and in between many times.
    assert found == sorted(found) and found.count(OLD) >= 6 and found.count(NEW) >= 2, found
    assert json.loads((folder / commit.step_folder(NEW) / "COMMIT").read_text())["attempt"] == 1
