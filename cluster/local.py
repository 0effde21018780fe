"""The embedded Ray cluster: one machine, everything on 127.0.0.1, token authentication, reused while it runs."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import processes, reaper
from cluster.authentication import make_state_folder, make_token, state_folder, token_headers, token_path
from cluster.network import free_ports
from cluster.processes import Mark
from configs.errors import ConfigError, TelarError, UnreachableError
from configs.schema import ClusterSection

START_SECONDS = 90.0
ANSWER_SECONDS = 15.0
PORTS_TRIED = 100
# A socket path may have 107 bytes; Ray adds /session_DATE_PID/sockets/plasma_store, 64 bytes, to its temporary folder.
LONGEST_TEMPORARY_FOLDER = 107 - 64


@dataclass(frozen=True)
class LocalCluster:
    """A running embedded cluster. `logical_cpus` is what Ray was told, whatever the machine has."""

    dashboard_url: str
    gcs_address: str
    started_by_us: bool
    logical_cpus: int
    session_folder: str


def find() -> LocalCluster | None:
    """The embedded cluster that runs, or None; what a dead one left is cleaned away.

    Raises UnreachableError when its processes live but its dashboard does not answer.
    """
    if not (state_folder() / "cluster.json").exists():
        return None
    with _lock():
        return _find()


def start(config: ClusterSection) -> LocalCluster:
    """Return the running embedded cluster, or start one and wait until it accepts jobs.

    Raises ConfigError when no dashboard port is free, TelarError when Ray does not come up (nothing is left behind).
    """
    with _lock():
        running = _find()
        if running is not None:
            return running
        return _start(config)


def stop() -> bool:
    """End the embedded cluster and all its jobs, and remove what it left; False when there was none."""
    if not (state_folder() / "cluster.json").exists():
        return False
    with _lock():
        state = _read_state()
        if state is None:
            return False
        _clean(state)
        return True


def _find() -> LocalCluster | None:
    state = _read_state()
    if state is None:
        return None
    mark = _mark(state)
    if not state.get("ready") or not mark.head_is_alive():
        _clean(state)
        return None
    deadline = time.monotonic() + ANSWER_SECONDS
    while not _answers(state["dashboard_url"] + "/api/version"):
        if not mark.head_is_alive():
            _clean(state)
            return None
        if time.monotonic() > deadline:
            raise UnreachableError(
                f"the embedded cluster (process {mark.pid}) runs but {state['dashboard_url']} did not answer within "
                f"{ANSWER_SECONDS:.0f} s; the machine may be overloaded, else run `telar down --force` and try again"
            )
        time.sleep(0.2)
    return _described(state, started_by_us=False)


def _start(config: ClusterSection) -> LocalCluster:
    home, token = make_state_folder(), make_token()
    dashboard_port = free_dashboard_port(config.dashboard_port)
    temporary = home / "ray"
    if len(str(temporary)) > LONGEST_TEMPORARY_FOLDER:
        temporary = Path(tempfile.mkdtemp(prefix="telar-ray-", dir="/tmp"))
    temporary.mkdir(mode=0o700, exist_ok=True)
    agent_port, client_port = free_ports(2)
    mark_text = secrets.token_hex(8)
    command = [
        *(sys.executable, reaper.__file__),
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", "0", "--no-monitor", "--include-log-monitor", "false"),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)),
        *("--dashboard-agent-listen-port", str(agent_port), "--ray-client-server-port", str(client_port)),
        *("--num-cpus", str(config.local_cpus), "--object-store-memory", str(config.local_object_store_bytes)),
        *("--temp-dir", str(temporary), "--log-color", "false"),
    ]
    log = home / "ray-start.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=temporary,
            env=_environment(token, mark_text),
            start_new_session=True,
        )
    state = {
        "ready": False,
        "head_pid": head.pid,
        "head_created_unix": psutil.Process(head.pid).create_time(),
        "mark": mark_text,
        "dashboard_url": f"http://127.0.0.1:{dashboard_port}",
        "gcs_address": "",
        "logical_cpus": config.local_cpus,
        "temporary_folder": str(temporary),
    }
    _write_state(state)
    try:
        address_file = temporary / "ray_current_cluster"
        _wait_until_ready(head, state["dashboard_url"], agent_port, address_file, log)
        state["gcs_address"] = address_file.read_text().strip()
        state["ready"] = True
        _write_state(state)
    except BaseException:
        _clean(state)
        head.wait()
        raise
    return _described(state, started_by_us=True)


def _wait_until_ready(head: subprocess.Popen, dashboard_url: str, agent_port: int, address: Path, log: Path) -> None:
    """Wait until `ray start` wrote its address, the dashboard knows the node and the job agent sees the raylet."""
    conditions: dict[str, Callable[[], bool]] = {
        "the dashboard": lambda: _answers(dashboard_url + "/api/version", b"ray_version"),
        "the job agent": lambda: _answers(f"http://127.0.0.1:{agent_port}/api/healthz", b"raylet: success"),
        "the node": lambda: _answers(dashboard_url + "/api/v0/nodes", b'"ALIVE"'),
        "the cluster's address": lambda: address.exists() and bool(address.read_text().strip()),
    }
    deadline = time.monotonic() + START_SECONDS
    for name, holds in conditions.items():
        while not holds():
            if head.poll() is not None:
                raise TelarError(f"Ray did not start (exit status {head.returncode}); it said:\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise TelarError(f"{name} of Ray was not ready within {START_SECONDS:.0f} s; it said:\n{_tail(log)}")
            time.sleep(0.05)


def _environment(token: Path, mark_text: str) -> dict[str, str]:
    """Environment of all the cluster's processes; addresses and tokens of other clusters are left out."""
    foreign = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID", "RAY_RUNTIME_ENV_HOOK")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {
        **kept,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without it `ray start` turns 127.0.0.1 into the machine's outward address and listens on all interfaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        processes.MARK_VARIABLE: mark_text,
    }


def free_dashboard_port(first: int) -> int:
    """The first port from `first` on that can be bound on 127.0.0.1; raises ConfigError when 100 are taken."""
    last = min(first + PORTS_TRIED - 1, 65535)
    for port in range(first, last + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigError(
        f"cluster.dashboard_port: every port from {first} to {last} is in use on 127.0.0.1; set it to a lower or "
        "another free port, e.g. --set cluster.dashboard_port=8265"
    )


def _answers(url: str, sign: bytes = b"") -> bool:
    request = urllib.request.Request(url, headers=token_headers())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as response:
            return response.status == 200 and sign in response.read()
    except (urllib.error.URLError, OSError):
        return False


def _described(state: dict, started_by_us: bool) -> LocalCluster:
    return LocalCluster(
        dashboard_url=state["dashboard_url"],
        gcs_address=state["gcs_address"],
        started_by_us=started_by_us,
        logical_cpus=state["logical_cpus"],
        session_folder=str(Path(state["temporary_folder"]) / "session_latest"),
    )


def _mark(state: dict) -> Mark:
    return Mark(pid=state["head_pid"], created_unix=state["head_created_unix"], text=state["mark"])


def _clean(state: dict) -> None:
    """End what is left of a cluster and remove its session folder, token and state."""
    processes.end(_mark(state))
    shutil.rmtree(state["temporary_folder"], ignore_errors=True)
    token_path().unlink(missing_ok=True)
    (state_folder() / "cluster.json").unlink(missing_ok=True)


def _read_state() -> dict | None:
    try:
        state = json.loads((state_folder() / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TelarError(f"{state_folder() / 'cluster.json'} is damaged ({error}); remove it") from error
    return state


def _write_state(state: dict) -> None:
    file = state_folder() / "cluster.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1))
    temporary.replace(file)


@contextmanager
def _lock() -> Iterator[None]:
    """One process at a time starts, looks for or stops the cluster."""
    with (make_state_folder() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
