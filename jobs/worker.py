"""The training actor: one rank in a process of its own on a node of the Ray cluster."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import ray

from cluster import commit
from cluster.environment import check_fingerprint
from cluster.network import GLOO_VARIABLE, interface_of
from data.shard_server import shard_opener
from jobs.loop import LoopEnd
from jobs.rank import Messages, RankReporter, RankTask, run_rank
from model.engine import preload
from model.operators import operator_environment


class ControllerMessages(Messages):
    """Messages to the controller, sent without waiting for an answer so that a slow controller stalls no step."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    def step(self, record: dict[str, Any]) -> None:
        """Send a finished step."""
        self._controller.record_step.remote(record)

    def rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """Wait until the controller has it: the last rank's message is what commits the step."""
        ray.get(self._controller.record_rank_file.remote(step, attempt, file, world_size, extra))

    def problem(self, text: str) -> None:
        """Send what went wrong."""
        self._controller.record_problem.remote(text)


@ray.remote(max_restarts=0, max_concurrency=4)
class TrainWorker:
    """One rank. `prepare` imports everything; `train` runs an attempt; `request_stop` may come at any time."""

    def __init__(self, environment: dict[str, str]) -> None:
        check_fingerprint()
        os.environ.update(environment)
        self._reporter: RankReporter | None = None
        self._stopping = threading.Event()

    def prepare(self, operators: str) -> dict[str, Any]:
        """Import torch and DeepSpeed; tell the node and a free port for the process group."""
        os.environ.update(operator_environment(operators))
        preload()
        address = ray.util.get_node_ip_address()
        interface = interface_of(address)
        if interface is not None:
            os.environ.setdefault(GLOO_VARIABLE, interface)
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return {"node": ray.get_runtime_context().get_node_id(), "address": address, "port": port, "pid": os.getpid()}

    def train(self, task: RankTask, master: tuple[str, int], local_rank: int, controller: Any, servers: Any) -> LoopEnd:
        """Run the attempt to its end on this rank."""
        os.environ.update(
            RANK=str(task.rank),
            WORLD_SIZE=str(task.world_size),
            LOCAL_RANK=str(local_rank),
            MASTER_ADDR=master[0],
            MASTER_PORT=str(master[1]),
        )
        return run_rank(task, ControllerMessages(controller), shard_opener(servers), self._announce)

    def _announce(self, reporter: RankReporter) -> None:
        self._reporter = reporter
        if self._stopping.is_set():
            reporter.request_stop()

    def request_stop(self) -> None:
        """Commit and leave after the step in progress."""
        self._stopping.set()
        if self._reporter is not None:
            self._reporter.request_stop()
