"""Checkpoints that storage does not take: training goes on, the user is told, the next one succeeds."""

import errno
import json
import os
import subprocess
import threading
import time

import pytest

from cluster import commit
from cluster.storage import Storage
from jobs.upload import Upload
from model.checkpoint import CheckpointReader
from tests.test_train_local import command, environment, project  # noqa: F401

FULL_BYTES = 5 * 2**20


def test_an_upload_that_moves_is_waited_for():
    go, beats = threading.Event(), []

    def work(upload):
        while not go.is_set():
            upload.moved(1)
            time.sleep(0.01)

    upload = Upload(7, work)

    def alive():
        beats.append(upload.bytes)
        if len(beats) == 2:
            go.set()

    # It takes longer than it may stand still.
    assert upload.wait(0.8, alive) and len(beats) == 2 and beats[0] < beats[1]
    assert not upload.given_up


def test_an_upload_that_stands_still_is_given_up_and_says_nothing_when_it_comes_back():
    go, said = threading.Event(), []

    def work(upload):
        go.wait()
        said.append(upload.given_up)

    upload = Upload(7, work)
    assert not upload.wait(0.1, lambda: said.append("alive"))
    go.set()
    assert upload.wait(5.0, lambda: None) and said == [True]


def test_errors_of_an_upload_reach_the_training_thread():
    def work(upload):
        raise MemoryError("no room for the copy")

    with pytest.raises(MemoryError, match="no room"):
        Upload(7, work).wait(5.0, lambda: None)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "runs" / "full" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_not_the_run(project, small_disk):  # noqa: F811
    filler = small_disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        while True:
            file.write(b"\0" * 65536)
            file.flush()
    storage = str(small_disk.parent.parent)
    options = ["--set", f"run.storage={storage}", "--set", "train.steps=60", "--set", "checkpoint.every_steps=4"]
    run = subprocess.Popen(
        command("full", *options, "--set", "checkpoint.keep=1"),
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in run.stdout:
        lines.append(line)
        if filler.exists() and "could not write its part of step" in line:
            filler.unlink()
    assert run.wait(120) == 0, "".join(lines)
    told = [line for line in lines if "could not write its part of step" in line]
    assert told and all("No space left on device" in line for line in told), "".join(lines)
    # Training went on, and what came later is whole.
    metrics = (small_disk.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 61))
    checkpoints = Storage(str(small_disk))
    committed, damaged = commit.latest(checkpoints)
    assert committed.step == 60 and damaged == []
    with CheckpointReader(checkpoints, committed) as reader:
        reader.check_complete()
