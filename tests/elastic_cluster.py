"""A Ray cluster of several nodes on this machine, and runs on it whose ranks and nodes a test can kill."""

import copy
import json
import os
import signal
import time
from contextlib import contextmanager, suppress

import psutil

from cluster.storage import Storage
from configs.load import parse_config, to_yaml
from data.prepare import prepare
from data.runners import serial
from jobs.attach import create_or_attach
from jobs.references import write_references
from tests.test_end_to_end import TINY, write_corpus

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def write_run(storage, code, name, replicas, sections):
    """What `telar submit` and the prepare stage leave in storage for a run."""
    tree = copy.deepcopy(TINY)
    tree["data"]["corpora"] = [{**corpus, "path": code} for corpus in tree["data"]["corpora"]]
    tree["run"] |= {"name": name, "storage": storage.url}
    # At the rate of TINY, differences in the last bit grow a thousandfold in ten steps.
    tree["optimizer"]["learning_rate"] = 0.05
    tree["parallelism"] = {"data": replicas}
    tree["tracking"] |= {"gauges": False, "log_samples": True}
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    config = parse_config(tree, "test")
    manifest = prepare(config, storage, serial, lambda line: None)
    storage.write_text(f"{name}/config.yaml", to_yaml(config))
    write_references(storage.child(name), manifest, None)


def kill_all(processes):
    """SIGKILL; some may end by themselves because others do."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


class ElasticCluster:
    """A head that holds no rank, and nodes with room for one replica each; this process is connected to it."""

    def __init__(self, folder, nodes):
        import ray
        from ray.cluster_utils import Cluster

        self.ray, self.storage = ray, Storage(str(folder / "runs"))
        (folder / "code").mkdir()
        write_corpus(folder / "code")
        self.code = str(folder / "code")
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH},
        )
        # Before there are other nodes: this process, and the controllers with it, belong to the head.
        ray.init(address=self._cluster.address, log_to_driver=False, namespace="telar")
        self.nodes = [self._cluster.add_node(**NODE) for _ in range(nodes)]
        self._cluster.wait_for_nodes()

    def close(self):
        """End everything."""
        self.ray.shutdown()
        self._cluster.shutdown()

    @property
    def address(self):
        """Where other processes find the cluster."""
        return self._cluster.address

    def add_node(self):
        """One more node, empty."""
        self.nodes.append(self._cluster.add_node(**NODE))

    def kill_node(self, node_id):
        """SIGKILL the node's raylet; its workers end because of that."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        node.kill_raylet(check_alive=False)
        self.nodes.remove(node)

    def drain(self, node_id, seconds):
        """Tell Ray that the node will be gone in so many seconds, as a cloud's notice of preemption does."""
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = self.ray._raylet.GcsClient(address=self._cluster.address)
        accepted, refusal = client.drain_node(node_id, reason, "test", int((time.time() + seconds) * 1000))
        assert accepted, refusal

    def wait_until_gone(self, node_id, seconds=90):
        """Until Ray lists the node as dead; what is left of its processes is ended."""
        deadline = time.monotonic() + seconds
        while any(node["NodeID"] == node_id and node["Alive"] for node in self.ray.nodes()):
            assert time.monotonic() < deadline, f"node {node_id[:8]} is still there"
            time.sleep(0.1)
        node = next(node for node in self.nodes if node.node_id == node_id)
        node.kill_all_processes(check_alive=False)
        self.nodes.remove(node)

    @contextmanager
    def frozen_node(self, node_id):
        """SIGSTOP the node's raylet; yields the time (Unix). At the end all its processes are ended."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        (raylet,) = (info.process.pid for info in node.all_processes["raylet"])
        family = psutil.Process(raylet).children(recursive=True)
        os.kill(raylet, signal.SIGSTOP)
        try:
            yield time.time()
        finally:
            kill_all(family)
            self.kill_node(node_id)
            psutil.wait_procs(family, timeout=10)

    def submit(self, name, **sections):
        """Prepare if that was not done yet, and start the train stage; returns the run."""
        write_run(self.storage, self.code, name, len(self.nodes), sections)
        return Run(self, name)


class Books:
    """What a run has written down."""

    def __init__(self, folder):
        self.folder = folder

    def lines(self, name):
        """The records of metrics.jsonl or events.jsonl so far."""
        if not self.folder.exists(name):
            return []
        return [json.loads(line) for line in self.folder.read_text(name).splitlines()]

    def events(self, kind):
        """Events of one kind."""
        return [event for event in self.lines("events.jsonl") if event["event"] == kind]

    def losses(self):
        """Loss of every step as the run goes on from it, and of every redone one beside it: step -> list."""
        found = {}
        for record in self.lines("metrics.jsonl"):
            found.setdefault(record["step"], []).append(record["loss"])
        return found

    def sampled_step(self):
        """The newest step whose samples a rank has noted, whether or not a controller heard of it."""
        lines = [
            line
            for name in self.folder.names("samples")
            for line in self.folder.read_text(f"samples/{name}").splitlines(keepends=True)
        ]
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def samples(self, steps, batch):
        """Digests of the samples of each step as the attempt saw it whose result the run went on from."""
        last = {record["step"]: record["attempt"] for record in self.lines("metrics.jsonl")}
        found = {step: [] for step in range(1, steps + 1)}
        for name in self.folder.names("samples"):
            for line in self.folder.read_text(f"samples/{name}").splitlines(keepends=True):
                entry = json.loads(line) if line.endswith("\n") else None
                if entry and last.get(entry["step"]) == entry["attempt"]:
                    found[entry["step"]] += entry["samples"]
        assert all(len(digests) == batch for digests in found.values()), {s: len(d) for s, d in found.items()}
        return found


class Run(Books):
    """A run whose train stage goes on in its controller."""

    def __init__(self, cluster, name):
        super().__init__(cluster.storage.child(name))
        self.ray = cluster.ray
        self.controller = create_or_attach(cluster.storage.url, name, ["train"], "test", None)
        self._outcome = self.controller.outcome.remote()

    def wait_for(self, condition, what, seconds=300):
        """Poll until the condition holds; the run must not have ended before."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert not self._ended() or condition(), f"ended before {what}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {self.lines('events.jsonl')[-5:]}"
        return found

    def _ended(self):
        """Whether the run is over; where the controller's process died, the one after it is asked from now on."""
        if not self.ray.wait([self._outcome], timeout=0.05)[0]:
            return False
        try:
            self.ray.get(self._outcome)
        except self.ray.exceptions.ActorUnavailableError:
            self._outcome = self.controller.outcome.remote()
            return False
        return True

    def controller_place(self):
        """Process and node of the controller."""
        import ray._private.state

        found = ray._private.state.actors(actor_id=self.controller._actor_id.hex())
        return found["Pid"], found["Address"]["NodeID"]

    def wait_for_step(self, step, attempt=1):
        """Until this attempt has done the step."""
        status = lambda: json.loads(self.folder.read_text("status.json"))  # noqa: E731
        self.wait_for(
            lambda: self.folder.exists("status.json") and status()["attempt"] == attempt and status()["step"] >= step,
            f"step {step} of attempt {attempt}",
        )

    def ranks(self):
        """(pid, node id) of the ranks of the latest attempt."""
        started = self.events("ranks_started")[-1]
        return list(zip(started["pids"], started["nodes"], strict=True))

    def kill(self, rank, how=signal.SIGKILL):
        """Send a signal to a rank's process."""
        os.kill(self.ranks()[rank][0], how)

    def stop(self):
        """Ask for a stop."""
        self.ray.get(self.controller.stop.remote("test"))

    def end(self, seconds=300):
        """The terminal state; the controller is removed."""
        deadline = time.monotonic() + seconds
        while not self._ended():
            assert time.monotonic() < deadline, f"no end within {seconds} s: {self.lines('events.jsonl')[-5:]}"
        state = self.ray.get(self._outcome)
        self.ray.kill(self.controller)
        return state
