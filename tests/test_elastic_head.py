"""The head's processes are killed and started again, over the same GCS storage (RocksDB): the run needs nobody.

The entrypoint is a process of its own here, as in a job; it is lost with the head and not started again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import processes
from cluster.network import free_ports
from cluster.storage import Storage
from jobs.run_view import LEASE_SECONDS
from tests.conftest import running_mark
from tests.elastic_cluster import HEALTH, NODE, Books, kill_all, write_run
from tests.test_elastic import AT_THE_END, BATCH, STEPS, TRAIN, check_same_course, redone, starts
from tests.test_end_to_end import TINY, submit, telar, write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent
ELASTIC = {"snapshot_every": 1}


class HeadAndNodes:
    """A head whose GCS keeps its tables in RocksDB, and two nodes; this process is not connected to them."""

    def __init__(self, folder, code):
        from ray.cluster_utils import Cluster

        self.storage, self._code = Storage(str(folder / "runs")), str(code)
        # It is given up and taken again in the test.
        (port,) = free_ports(1)
        (folder / "gcs").mkdir()
        system = {**HEALTH, "gcs_storage": "rocksdb", "gcs_storage_path": str(folder / "gcs")}
        self._head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": system}
        self._head["gcs_server_port"] = port
        self._cluster = Cluster(initialize_head=True, head_node_args=self._head)
        for _ in range(2):
            self._cluster.add_node(**NODE)
        self._clients = []

    def submit(self, name):
        """Start the entrypoint of a run's job; returns it and the run's books."""
        sections = {"train": TRAIN, "checkpoint": AT_THE_END, "elastic": ELASTIC}
        write_run(self.storage, self._code, name, 2, sections)
        command = [sys.executable, "-m", "jobs.run", f"{self.storage.url}/{name}", "--stage", "train"]
        environment = {**os.environ, "RAY_ADDRESS": self._cluster.address, "PYTHONPATH": str(ROOT)}
        client = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
        self._clients.append(client)
        return client, Books(self.storage.child(name))

    def kill_controller(self):
        """SIGKILL the controller's process, which the head's raylet has started."""
        (raylet,) = (info.process.pid for info in self._cluster.head_node.all_processes["raylet"])
        workers = psutil.Process(raylet).children(recursive=True)
        (controller,) = [worker for worker in workers if "ray::Controller" in " ".join(worker.cmdline())]
        controller.kill()

    def kill_head(self, client):
        """SIGKILL the GCS, the head's raylet and all else that the head runs, the entrypoint with it."""
        head, self._cluster.head_node = self._cluster.head_node, None
        started = [info.process.pid for infos in head.all_processes.values() for info in infos]
        family = [psutil.Process(pid) for pid in (*started, client.pid)]
        family += [child for process in family for child in process.children(recursive=True)]
        kill_all(family)
        client.wait()
        head.kill_all_processes(check_alive=False, allow_graceful=False)

    def start_head(self):
        """A head at the same address, over the same GCS storage."""
        self._cluster.add_node(**self._head)

    def close(self):
        for client in self._clients:
            client.kill()
            client.wait()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    (folder / "code").mkdir()
    write_corpus(folder / "code")
    cluster = HeadAndNodes(folder, folder / "code")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def undisturbed(cluster):
    client, books = cluster.submit("undisturbed")
    assert client.wait(timeout=300) == 0
    return {step: loss for step, (loss,) in books.losses().items()}, books.samples(STEPS, BATCH)


def status(books):
    return json.loads(books.folder.read_text("status.json")) if books.folder.exists("status.json") else {"state": None}


def wait_for(books, condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition(status(books)):
        assert time.monotonic() < deadline, f"waited {seconds} s: {status(books)}"
        time.sleep(0.05)


def wait_until(condition, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def test_the_entrypoint_follows_a_controller_that_is_started_again(cluster, undisturbed):
    client, books = cluster.submit("followed")
    wait_for(books, lambda found: found["state"] == "training" and found["step"] >= 20)
    cluster.kill_controller()
    assert client.wait(timeout=300) == 0
    assert len(books.events("controller_restarted")) == 1 and redone(books) <= 1
    check_same_course(books, undisturbed, exact=True)


def test_a_run_survives_the_death_of_the_head_and_its_return(cluster, undisturbed):
    client, books = cluster.submit("headless")
    wait_for(books, lambda found: found["state"] == "training" and found["step"] >= 20)
    killed = time.time()
    cluster.kill_head(client)
    reached = books.sampled_step()
    wait_until(lambda: books.sampled_step() >= reached + 5, "steps without a head")
    # The ranks may not end the run before the new controller is there.
    (held, _) = books.events("ranks_started")[-1]["pids"]
    os.kill(held, signal.SIGSTOP)
    cluster.start_head()
    again = time.time()
    wait_until(lambda: books.events("controller_restarted"), "the controller's return")
    # It may be dead by now: the new controller ends what the old one has left.
    with suppress(ProcessLookupError):
        os.kill(held, signal.SIGCONT)
    wait_for(books, lambda found: found["state"] in ("finished", "failed", "stopped"))
    assert status(books)["state"] == "finished"
    (restarted,) = books.events("controller_restarted")
    assert starts(books)[1]["source"] == "memory" and redone(books) <= 1
    check_same_course(books, undisturbed, exact=True)
    first = min(record["unix_seconds"] for record in books.lines("metrics.jsonl") if record["attempt"] == 2)
    seconds = [f"{moment - killed:.1f} s" for moment in (again, restarted["unix_seconds"], first)]
    alone = starts(books)[1]["step"] - restarted["step"]
    print(f"\nhead, controller, next step after the kill: {', '.join(seconds)}; {alone} steps without a head")


def test_a_run_whose_cluster_is_gone_is_resumed_by_its_name_on_a_fresh_one(tmp_path, monkeypatch):
    """Without fault tolerance of the GCS, as on the embedded cluster, all processes go with the head."""
    (tmp_path / "code").mkdir()
    write_corpus(tmp_path / "code")
    settings = {"train": {**TRAIN, "steps": 200}, "checkpoint": {"every_steps": 10}, "parallelism": {"data": 2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **settings, "tracking": {"log_samples": True}}))
    home = tmp_path / "home"
    monkeypatch.setenv("TELAR_HOME", str(home))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    try:
        submit(tmp_path, "whole", "--stage", "prepare", "--embedded")
        telar(tmp_path, "submit", "--resume", "whole", "--stage", "train", "--wait", "--embedded")
        whole = Books(Storage(str(tmp_path / "runs")).child("whole"))
        telar(tmp_path, "submit", "tiny.yaml", "--set", "run.name=lost", "--embedded")
        books = Books(Storage(str(tmp_path / "runs")).child("lost"))
        wait_for(books, lambda found: found["state"] == "training" and found["step"] >= 25)
        kill_all(processes.members(running_mark(home)))
        reached = books.lines("metrics.jsonl")[-1]["step"]
        # A controller that still works somewhere would renew its lease: a resume is refused until it has run out.
        wait_for(books, lambda found: time.time() - found["updated_unix"] > LEASE_SECONDS)
        telar(tmp_path, "submit", "--resume", "lost", "--stage", "train", "--wait", "--embedded")
        assert status(books)["state"] == "finished"
        expected = {step: loss for step, (loss,) in whole.losses().items()}
        found = books.losses()
        assert found.keys() == expected.keys()
        assert all(value == expected[step] for step, values in found.items() for value in values)
        assert 0 <= redone(books) <= 10 + 1 and reached < 200
        assert books.samples(200, BATCH) == whole.samples(200, BATCH)
    finally:
        telar(tmp_path, "down", "--force")
