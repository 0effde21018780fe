"""A process seen and ended from outside, on its own node: for one that does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOK_SECONDS = 8


def on_node(function: Any, node: str) -> Any:
    """The function as a Ray task of that node, which takes no CPU."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy)


def look(pid: int, created: float) -> str:
    """What the process does: its state, and its stacks if py-spy is installed here and may read them."""
    process = _find(pid, created)
    if process is None:
        return f"process {pid} is gone"
    text = f"process {pid} does not answer; its state is {process.status()}"
    py_spy = Path(sys.executable).parent / "py-spy"
    if not py_spy.exists():
        return text
    command = [str(py_spy), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{text}\npy-spy did not answer either"
    return f"{text}\n{done.stdout or done.stderr}"


def end(pid: int, created: float) -> None:
    """SIGKILL, which a process that is stopped or spins hears too."""
    if _find(pid, created) is not None:
        os.kill(pid, signal.SIGKILL)


def _find(pid: int, created: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == created else None
    except psutil.NoSuchProcess:
        return None
