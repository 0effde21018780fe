"""`python -m jobs.train_local CONFIG`: the same training loop in plain processes, for a machine without Ray.

Prepares the data in this process, starts a process for each rank of `parallelism`, and keeps the run's books here. The
run directory is the one that a Ray job writes, without evaluation and report.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from cluster import commit
from cluster.network import free_ports
from cluster.storage import Storage
from configs.errors import ConfigError, TelarError
from configs.load import load_config, to_yaml
from configs.schema import RunConfig
from data.manifest import Manifest
from data.prepare import prepare
from data.runners import serial
from jobs.codebook import ensure_codebook
from jobs.commands.paths import with_absolute_paths
from jobs.ledger import Ledger
from jobs.progress import Progress
from jobs.rank import Messages, RankReporter, RankTask, run_rank
from jobs.references import write_references
from jobs.trainable import check_trainable
from model.operators import operator_environment, prepare_operators

MESSAGES_AT_ONCE = 1000


class QueueMessages(Messages):
    """Messages to the parent process through a multiprocessing queue."""

    def __init__(self, outbox: Any) -> None:
        self._outbox = outbox

    def step(self, record: dict[str, Any]) -> None:
        """Send a finished step."""
        self._outbox.put(("step", record))

    def rank_file(self, step: int, attempt: int, file: commit.RankFile, world_size: int, extra: dict) -> None:
        """Send what this rank wrote."""
        self._outbox.put(("file", (step, attempt, file, world_size, extra)))

    def problem(self, text: str) -> None:
        """Send what went wrong."""
        self._outbox.put(("problem", text))


def rank_process(task: RankTask, environment: dict[str, str], outbox: Any) -> None:
    """Body of one rank's process; SIGTERM asks it to commit and leave."""
    os.environ.update(environment)
    torch.set_num_threads(task.config.train.threads_per_rank)
    from data.shard_server import plain_opener

    threading.Thread(target=_die_with_parent, name="parent-watch", daemon=True).start()

    def announce(reporter: RankReporter) -> None:
        signal.signal(signal.SIGTERM, lambda *_: reporter.request_stop())

    storage = Storage(task.storage_url)
    manifest = Manifest.read(storage, task.data_folder)
    data = task.config.data
    opener = plain_opener(
        storage,
        manifest,
        cache_bytes=data.cache_bytes,
        timeout_seconds=data.fetch_timeout_seconds,
        quarantine_fraction=data.quarantine_fraction,
    )
    run_rank(task, QueueMessages(outbox), opener, announce, Progress())
    outbox.close()
    outbox.join_thread()
    # All is written; torch's threads may abort the interpreter while it is torn down (seen as exit status -6).
    os._exit(0)


def _die_with_parent() -> None:
    """A rank whose parent was killed has nobody to commit its checkpoints: it ends at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def train_locally(config: RunConfig, storage: Storage, run: str) -> int:
    """Prepare and train; returns the exit code (0 finished, 1 a rank failed)."""
    ledger = Ledger(storage, run, config)
    encode_image = ensure_codebook(config, storage, serial, print)
    manifest = prepare(config, storage, serial, print, encode_image)
    write_references(storage.child(run), manifest, encode_image.folder if encode_image is not None else None)
    operators = prepare_operators()
    print(operators.message)
    latest, damaged = commit.latest(ledger.checkpoints)
    for message in damaged:
        print(message)
    attempt, world_size = ledger.begin_attempt(), config.parallelism.ranks
    context = multiprocessing.get_context("spawn")
    outbox = context.Queue()
    (port,) = free_ports(1)
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(config.train.threads_per_rank),
            **operator_environment(operators.mode),
        }
        if config.cluster.device == "cpu" or not torch.cuda.is_available():
            environment["DS_ACCELERATOR"] = "cpu"
        step = latest.step if latest else None
        task = RankTask(config, storage.url, run, manifest.folder, attempt, rank, world_size, step)
        processes.append(context.Process(target=rank_process, args=(task, environment, outbox), name=f"rank-{rank}"))
    ledger.update(state="training", stage="train", attempt=attempt, world_size=world_size)
    for process in processes:
        process.start()
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    printed = 0
    try:
        while any(process.is_alive() for process in processes):
            _drain(outbox, ledger)
            lines = ledger.lines(printed)
            printed += len(lines)
            for line in lines:
                print(line, flush=True)
            if any(process.exitcode for process in processes):
                break
            wait([process.sentinel for process in processes if process.is_alive()], timeout=0.2)
    finally:
        for process in processes:
            if process.is_alive() and any(other.exitcode for other in processes):
                process.kill()
            process.join()
    while not outbox.empty():
        _drain(outbox, ledger, wait_seconds=1.0)
    for line in ledger.lines(printed):
        print(line, flush=True)
    failed = [process.name for process in processes if process.exitcode]
    done = commit.latest(ledger.checkpoints)[0]
    finished = not failed and done is not None and done.step >= config.train.steps
    ledger.update(state="finished" if finished else "failed" if failed else "stopped")
    ledger.close()
    if failed:
        print(f"error: {', '.join(failed)} failed; see {ledger.folder.url}/logs", file=sys.stderr)
        return 1
    return 0 if finished else 3


def _drain(outbox: Any, ledger: Ledger, wait_seconds: float = 0.0) -> None:
    """Take what has arrived, at most MESSAGES_AT_ONCE so that fast steps cannot keep the caller here."""
    for _ in range(MESSAGES_AT_ONCE):
        try:
            kind, payload = outbox.get(block=wait_seconds > 0, timeout=wait_seconds)
        except queue.Empty:
            return
        if kind == "step":
            ledger.record_step(payload)
        elif kind == "problem":
            ledger.say(payload)
        else:
            ledger.record_rank_file(*payload)


def main() -> int:
    """Parse, prepare, train."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_local", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    parser.add_argument("--resume", action="store_true", help="continue the run of that name from its last commit")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    storage = Storage(config.run.storage)
    run = config.run.name or f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    named = config.run.model_copy(update={"name": run, "storage": storage.url})
    config = with_absolute_paths(config.model_copy(update={"run": named}), arguments.config, check=True)
    check_trainable(config)
    if run == "data":
        raise ConfigError("run.name: 'data' is where prepared data lies in every storage; choose another name")
    if storage.exists(f"{run}/config.yaml") and not arguments.resume:
        raise ConfigError(f"run.name: {run!r} exists in {storage.url}; choose another name or pass --resume")
    storage.write_text(f"{run}/config.yaml", to_yaml(config))
    return train_locally(config, storage, run)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TelarError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
