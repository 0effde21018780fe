"""Preloaded processes that re-form gloo groups per case, so that matrices of distributed cases stay cheap.

`gloo_pool` is a fixture; `gloo_pool.run(2, function, *arguments)` calls a module-level function in two processes with
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, and returns the results by rank. Processes start when
first needed, have torch and DeepSpeed imported, and end with the test session (or when its end of the pipe closes).
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

from cluster.network import free_ports

SIZE = 8
CASE_TIMEOUT_SECONDS = 600
# Groups that DeepSpeed keeps alive (ZeRO-3's, the pipeline's) leave threads that wake up 100 times a second.
MOST_THREADS = 60


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


class GlooPool:
    """At most `size` processes; one case at a time."""

    def __init__(self, size=SIZE, timeout_seconds=CASE_TIMEOUT_SECONDS):
        self._size, self._timeout_seconds = size, timeout_seconds
        self._members = []

    def run(self, world_size, function, *arguments, environment=None):
        """Results of `function(*arguments)` by rank; raises RankFailed with the first failing rank's traceback."""
        assert 1 <= world_size <= self._size, f"{world_size} ranks asked of a pool of {self._size}"
        self._start(world_size)
        members, (port,) = self._members[:world_size], free_ports(1)
        for rank, (_, pipe) in enumerate(members):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(environment or {}),
            }
            pipe.send((function.__module__, function.__qualname__, arguments, variables))
        crowded = False
        results, waiting = {}, {pipe: rank for rank, (_, pipe) in enumerate(members)}
        deadline = time.monotonic() + self._timeout_seconds
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise RankFailed(f"ranks {sorted(waiting.values())} gave no result in {self._timeout_seconds} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "its process died"
                if ok:
                    threads, value = value
                    crowded = crowded or threads > MOST_THREADS
                else:
                    # The others may wait for this one in a collective: end them all, later cases start anew.
                    self.close()
                    raise RankFailed(f"rank {rank} of {world_size}: {value}")
                results[rank] = value
        if crowded:
            self.close()
        return [results[rank] for rank in range(world_size)]

    def close(self):
        """End all processes."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
        for process, _ in self._members:
            process.join()
        self._members = []

    def _start(self, count):
        context = multiprocessing.get_context("spawn")
        while len(self._members) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(theirs,), daemon=True, name="gloo-pool")
            # Read by the child when it imports torch, before any of our code could set it.
            before = os.environ.get("OMP_NUM_THREADS")
            os.environ["OMP_NUM_THREADS"] = "1"
            try:
                process.start()
            finally:
                os.environ.pop("OMP_NUM_THREADS")
                if before is not None:
                    os.environ["OMP_NUM_THREADS"] = before
            theirs.close()
            self._members.append((process, ours))


def _member(pipe: Connection):
    # Up to eight of these compute at once: a test with deadlines of Ray's beside them comes first.
    os.nice(5)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from model.engine import preload

    torch.set_num_threads(1)
    preload()
    while True:
        try:
            module, name, arguments, variables = pipe.recv()
        except EOFError:
            return
        os.environ.update(variables)
        try:
            value = getattr(importlib.import_module(module), name)(*arguments)
            value = (True, (sum(1 for _ in Path("/proc/self/task").iterdir()), value))
        except Exception:  # noqa: BLE001  (whatever a case raises belongs to the test process)
            value = (False, traceback.format_exc())
        pipe.send(value)


_POOL = GlooPool()
atexit.register(_POOL.close)


@pytest.fixture(scope="session")
def gloo_pool():
    """The session's pool; importing this fixture in several modules gives the same processes."""
    return _POOL
