"""A Ray cluster of several nodes on this machine, and runs on it whose ranks and nodes a test can kill."""

import copy
import json
import os
import signal
import time

from cluster.storage import Storage
from configs.load import parse_config, to_yaml
from data.prepare import prepare
from data.runners import serial
from jobs.controller import create_or_attach
from jobs.references import write_references
from tests.test_end_to_end import TINY, write_corpus

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


class ElasticCluster:
    """A head that holds no rank, and nodes with room for one replica each; this process is connected to it."""

    def __init__(self, folder, nodes):
        import ray
        from ray.cluster_utils import Cluster

        self.ray, self.storage = ray, Storage(str(folder / "runs"))
        (folder / "code").mkdir()
        write_corpus(folder / "code")
        self._code = str(folder / "code")
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH},
        )
        # Before there are other nodes: this process, and the controllers with it, belong to the head.
        ray.init(address=self._cluster.address, log_to_driver=False, namespace="telar")
        self.nodes = [self._cluster.add_node(**NODE) for _ in range(nodes)]
        self._cluster.wait_for_nodes()
        self._references = None

    def close(self):
        """End everything."""
        self.ray.shutdown()
        self._cluster.shutdown()

    def add_node(self):
        """One more node, empty."""
        self.nodes.append(self._cluster.add_node(**NODE))

    def kill_node(self, node_id):
        """SIGKILL the node's raylet; its workers end because of that."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        node.kill_raylet(check_alive=False)
        self.nodes.remove(node)

    def submit(self, name, **sections):
        """Prepare if that was not done yet, and start the train stage; returns the run."""
        tree = copy.deepcopy(TINY)
        tree["data"]["corpora"] = [{**corpus, "path": self._code} for corpus in tree["data"]["corpora"]]
        tree["run"] |= {"name": name, "storage": self.storage.url}
        # At the rate of TINY, differences in the last bit grow a thousandfold in ten steps.
        tree["optimizer"]["learning_rate"] = 0.05
        tree["parallelism"] = {"data": len(self.nodes)}
        tree["tracking"] |= {"gauges": False, "log_samples": True}
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values
        config = parse_config(tree, "test")
        manifest = prepare(config, self.storage, serial, lambda line: None)
        self.storage.write_text(f"{name}/config.yaml", to_yaml(config))
        write_references(self.storage.child(name), manifest, None)
        return Run(self, name)


class Run:
    """A run whose train stage goes on in its controller."""

    def __init__(self, cluster, name):
        self.ray, self.folder = cluster.ray, cluster.storage.child(name)
        self.controller = create_or_attach(cluster.storage.url, name)
        self._outcome = self.controller.execute.remote(["train"], "test", None)

    def lines(self, name):
        """The records of metrics.jsonl or events.jsonl so far."""
        if not self.folder.exists(name):
            return []
        return [json.loads(line) for line in self.folder.read_text(name).splitlines()]

    def events(self, kind):
        """Events of one kind."""
        return [event for event in self.lines("events.jsonl") if event["event"] == kind]

    def wait_for(self, condition, what, seconds=120):
        """Poll until the condition holds; the run must not have ended before."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert not self.ray.wait([self._outcome], timeout=0.05)[0] or condition(), f"ended before {what}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {self.lines('events.jsonl')[-5:]}"
        return found

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

    def end(self, seconds=180):
        """The terminal state; the controller is removed."""
        state = self.ray.get(self._outcome, timeout=seconds)
        self.ray.kill(self.controller)
        return state

    def losses(self):
        """Loss of every step as the run goes on from it, and of every redone one beside it: step -> list."""
        found = {}
        for record in self.lines("metrics.jsonl"):
            found.setdefault(record["step"], []).append(record["loss"])
        return found

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
