"""`python -m jobs.train_local`: the same loop in plain processes, on a machine that has no Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import commit
from cluster.storage import Storage
from tests.test_end_to_end import TINY, write_corpus

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "code").mkdir()
    write_corpus(folder / "code")
    without_ray = folder / "without_ray"
    without_ray.mkdir()
    (without_ray / "ray.py").write_text("raise ImportError('this machine has no Ray')\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


def command(name, *more):
    return [sys.executable, "-m", "jobs.train_local", "tiny.yaml", "--set", f"run.name={name}", *more]


def environment(project):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(project / "without_ray"), str(ROOT)])}


def run(project, name, *more, check=0):
    done = subprocess.run(
        command(name, *more), cwd=project, env=environment(project), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def losses(project, name):
    lines = (project / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_two_plain_processes_train_commit_and_resume(project):
    run(project, "whole")
    assert sorted(losses(project, "whole")) == [1, 2, 3, 4, 5, 6]
    assert commit.committed_steps(Storage(str(project / "runs/whole/checkpoints"))) == [3, 6]
    run(project, "parts", "--set", "train.steps=3")
    assert "exists" in run(project, "parts", check=2).stderr
    run(project, "parts", "--resume")
    assert losses(project, "parts") == losses(project, "whole")


@pytest.mark.slow
def test_stages_of_tensor_ranks_and_then_one_rank_train_as_one_process_does(project):
    """Two stages of two tensor ranks, whose checkpoint one process resumes."""
    run(project, "alone", "--set", "parallelism.data=1")
    run(project, "shared", "--set", "parallelism={data: 1, pipeline: 2, tensor: 2}", "--set", "train.steps=3")
    run(project, "shared", "--set", "parallelism.data=1", "--resume")
    alone, found = losses(project, "alone"), losses(project, "shared")
    assert found == pytest.approx(alone, abs=1e-4)
    assert found[1] == pytest.approx(alone[1], abs=1e-5)


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_samples(project):
    run(project, "two", "--set", "model.dropout=0.1")
    run(project, "three", "--set", "parallelism.data=3")
    run(project, "one", "--set", "parallelism.data=1")
    two, three, one = (losses(project, name) for name in ("two", "three", "one"))
    assert two == pytest.approx(one, abs=1e-4) and three == pytest.approx(one, abs=1e-4)
    assert two[1] == pytest.approx(one[1], abs=1e-5)


def test_ranks_end_when_their_parent_is_killed(project):
    parent = subprocess.Popen(
        command("orphans", "--set", "train.steps=100000"),
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in parent.stdout:
        if line.startswith("step 2/"):
            break
    ranks = psutil.Process(parent.pid).children(recursive=True)
    assert len(ranks) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_commits_and_ends(project):
    parent = subprocess.Popen(
        command("asked", "--set", "train.steps=100000"),
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in parent.stdout:
        if line.startswith("step 2/"):
            break
    started = time.monotonic()
    parent.terminate()
    parent.stdout.read()
    assert parent.wait(timeout=60) == 3
    assert time.monotonic() - started < 60
    status = json.loads((project / "runs/asked/status.json").read_text())
    assert status["state"] == "stopped"
    assert commit.committed_steps(Storage(str(project / "runs/asked/checkpoints")))[-1] == status["step"]
