"""The training actor: a process on a node of the Ray cluster that is a rank of one attempt after another."""

from __future__ import annotations

import faulthandler
import os
import shutil
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray

from cluster import commit
from cluster.environment import check_fingerprint
from cluster.network import GLOO_VARIABLE, interface_of
from data.shard_server import shard_opener
from jobs.loop import LoopEnd
from jobs.progress import Beat, Progress
from jobs.rank import Messages, RankReporter, RankTask, run_rank
from jobs.vault import Part, fetch
from model.engine import preload
from model.operators import operator_environment

# Object stores are written every half minute, whatever a step takes; older records are not kept for ever.
UNWRITTEN_STEPS = 4096


class ControllerMessages(Messages):
    """Messages to the controller, sent without waiting for an answer so that a slow controller stalls no step."""

    def __init__(self, controller: Any, vault: Any) -> None:
        self._controller, self._vault = controller, vault
        self._answers: list[ray.ObjectRef] = []
        self._unwritten: deque[dict[str, Any]] = deque(maxlen=UNWRITTEN_STEPS)
        self._taken = 0

    def step(self, record: dict[str, Any]) -> None:
        """Send a finished step, and again those before it that may be under way: Ray may deliver calls out of order."""
        self._settle()
        self._unwritten.append(record)
        sent = [known for known in self._unwritten if known["step"] > self._taken]
        self._answers.append(self._controller.record_steps.remote(sent))

    def unwritten(self) -> list[dict[str, Any]]:
        """Steps that were sent and of which the controller has not said that they lie in storage."""
        self._settle()
        return list(self._unwritten)

    def _settle(self) -> None:
        if not self._answers:
            return
        answered, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        for answer in answered:
            try:
                taken, written = ray.get(answer)
            except ray.exceptions.RayError:
                # Lost with the controller's process, or refused by storage.
                continue
            self._taken = max(self._taken, taken)
            while self._unwritten and self._unwritten[0]["step"] <= written:
                self._unwritten.popleft()

    def rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """Wait until the controller has it: the last rank's message is what commits the step."""
        ray.get(self._controller.record_rank_file.remote(step, attempt, file, world_size, extra))

    def problem(self, text: str) -> None:
        """Send what went wrong."""
        self._controller.record_problem.remote(text)

    def snapshot(
        self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict, content: bytes
    ) -> None:
        """Wait until this node's vault has it, and another one's a copy."""
        ray.get(self._vault.deliver.remote(Part(step, attempt, world_size, file, extra), content))


class Place(NamedTuple):
    """Where a training process is. `created` (unix seconds) tells it from a later one of the same pid."""

    node: str
    address: str
    pid: int
    created: float


@ray.remote(max_restarts=0, max_concurrency=2, concurrency_groups={"control": 2})
class TrainWorker:
    """One process. `prepare` imports everything; each `train` is a rank of an attempt; the rest answers meanwhile."""

    def __init__(self, environment: dict[str, str]) -> None:
        check_fingerprint()
        os.environ.update(environment)
        self._lock = threading.Lock()
        self._progress = Progress()
        self._reporter: RankReporter | None = None
        # Attempts up to this number were asked to commit and leave.
        self._stopped_attempt = 0
        self._attempt = 0
        self._store: Any = None

    def prepare(self, operators: str) -> Place:
        """Import torch and DeepSpeed, so that an attempt starts at once."""
        os.environ.update(operator_environment(operators))
        preload()
        address, process = ray.util.get_node_ip_address(), psutil.Process()
        interface = interface_of(address)
        if interface is not None:
            os.environ.setdefault(GLOO_VARIABLE, interface)
        return Place(ray.get_runtime_context().get_node_id(), address, process.pid, process.create_time())

    def open_store(self) -> int:
        """Open the store at which an attempt's ranks meet; returns its port, which the store itself has chosen.

        A port that is looked for first and listened on later may be another process's by then.
        """
        from torch.distributed import TCPStore

        # That of the attempt before ends with its last reference.
        self._store = None
        self._store = TCPStore(ray.util.get_node_ip_address(), 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def train(
        self, task: RankTask, master: tuple[str, int], local_rank: int, controller: Any, servers: Any, vault: Any
    ) -> LoopEnd:
        """Run the attempt to its end on this rank; `vault` is this node's, or None."""
        os.environ.update(
            RANK=str(task.rank),
            WORLD_SIZE=str(task.world_size),
            LOCAL_RANK=str(local_rank),
            MASTER_ADDR=master[0],
            MASTER_PORT=str(master[1]),
            # The name is of torchrun, whose agent opens the store: rank 0 must not open another one.
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        with self._lock:
            self._reporter, self._progress, self._attempt = None, Progress(), task.attempt
        opener, messages = shard_opener(servers), ControllerMessages(controller, vault)
        if task.memory is None:
            return run_rank(task, messages, opener, self._announce, self._progress)
        with tempfile.TemporaryDirectory(prefix="telar-memory-") as folder:
            restored = Path(folder, "snapshot")

            def announce(reporter: RankReporter) -> None:
                # The state is restored: a process that is killed while it trains leaves no copy of it on the disk.
                shutil.rmtree(restored)
                self._announce(reporter)

            memory = fetch(task.memory, vault, str(restored))
            return run_rank(task, messages, opener, announce, self._progress, memory)

    def _announce(self, reporter: RankReporter) -> None:
        with self._lock:
            self._reporter = reporter
            if self._stopped_attempt >= self._attempt:
                reporter.request_stop()

    @ray.method(concurrency_group="control")
    def request_stop(self, attempt: int) -> None:
        """Commit and leave after the step in progress; an attempt that has not begun leaves after its first."""
        with self._lock:
            self._stopped_attempt = max(self._stopped_attempt, attempt)
            if self._reporter is not None and self._attempt <= attempt:
                self._reporter.request_stop()

    @ray.method(concurrency_group="control")
    def beat(self) -> Beat:
        """The training thread's latest sign of life."""
        return self._progress.latest

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        """Where all threads of this process are."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            return file.read().decode()
