"""`telar doctor`: looks at this machine, the storage and the cluster, and says what to fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from cluster import local
from cluster.authentication import make_state_folder
from cluster.environment import ROOT
from cluster.storage import Storage
from configs.errors import TelarError
from configs.schema import ClusterSection
from jobs.commands.addresses import given_address_url
from jobs.commands.runs import storage_for
from jobs.commands.submitting import probe_storage

ESSENTIAL = ("ray", "torch", "deepspeed", "pyarrow", "pydantic", "tokenizers", "safetensors", "fsspec", "numpy")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at: `ok`, `warn` (works, with a drawback) or `fail`, what was found, and the fix if any."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return asdict(self)

    def as_line(self) -> str:
        """For people."""
        return f"{self.state:<5}{self.name:<11}{self.found}" + (f"\n     fix: {self.fix}" if self.fix else "")


def examine(storage_option: str | None, address_option: str | None) -> list[Check]:
    """All checks, in the order in which a newcomer would mend them."""
    checks = [_python(), *_packages(), _hardware(), _shared_memory(), _compiler(), _gpus()]
    storage = storage_for(storage_option)
    checks += [_checked("storage", lambda: _storage(storage)), _disk(storage)]
    checks += [_checked("state", lambda: Check("state", "ok", f"{make_state_folder()} is private to this user"))]
    checks += [_checked("ports", _ports), _checked("cluster", lambda: _cluster(address_option))]
    return checks


def _checked(name: str, look: Callable[[], Check]) -> Check:
    """A check whose TelarError is its finding."""
    try:
        return look()
    except TelarError as error:
        return Check(name, "fail", str(error))


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("python", "ok", f"{version}, {sys.executable}")
    return Check("python", "fail", version, "Telar needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.11 .venv")


def _packages() -> list[Check]:
    """Installed versions against requirements.lock; a local build tag (2.13.0+cpu) is no difference."""
    lock = ROOT / "requirements.lock"
    if not lock.exists():
        return [Check("packages", "warn", f"{lock} is missing, so versions cannot be compared", "check the file out")]
    wrong, missing, right = [], [], 0
    for line in lock.read_text().splitlines():
        name, separator, wanted = line.split(";")[0].strip().partition("==")
        if not separator or name.startswith("#"):
            continue
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed.split("+")[0] == wanted.split("+")[0]:
            right += 1
        else:
            wrong.append(f"{name} {installed} (locked {wanted})")
    bad = [text for text in [*wrong, *missing] if text.split()[0] in ESSENTIAL]
    if not wrong and not missing:
        return [Check("packages", "ok", f"all {right} as in requirements.lock")]
    found = "; ".join([*wrong, *(f"{name} is not installed" for name in missing)])
    return [Check("packages", "fail" if bad else "warn", found, "touch requirements.lock && make .venv")]


def _hardware() -> Check:
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory()
    found = f"{cores} cores, {memory.total / GIB:.1f} GiB memory, {memory.available / GIB:.1f} GiB available"
    if memory.available < 4 * GIB:
        return Check("hardware", "warn", found, "the smoke run takes about 4 GiB; end other programs")
    return Check("hardware", "ok", found)


def _shared_memory() -> Check:
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", "warn", "absent: Ray keeps objects in /tmp, slower", "in a container: --shm-size 2g")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < 2 * ClusterSection().local_object_store_bytes:
        return Check(
            "/dev/shm", "warn", found, "in a container: --shm-size 2g; or lower cluster.local_object_store_bytes"
        )
    return Check("/dev/shm", "ok", found)


def _compiler() -> Check:
    found = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if found:
        return Check("compiler", "ok", found)
    return Check(
        "compiler",
        "warn",
        "no C++ compiler: runs go on without DeepSpeed's shared-memory communicator, a little slower",
        "apt-get install g++",
    )


def _gpus() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("gpus", "ok", "none (no nvidia-smi); training uses the CPU")
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    names = [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]
    if not names:
        said = (answer.stderr or answer.stdout).strip()[:120]
        return Check("gpus", "warn", f"nvidia-smi finds none: {said}", "check the driver; CPU runs work")
    import torch

    if torch.cuda.device_count() < len(names):
        build = f"torch {torch.__version__} sees {torch.cuda.device_count()} of {len(names)} GPUs"
        return Check("gpus", "warn", build, "install torch's CUDA build into .venv, see README")
    return Check("gpus", "ok", f"{len(names)}: {names[0].split(' (')[0]}")


def _storage(storage: Storage) -> Check:
    probe_storage(storage)
    return Check("storage", "ok", f"{storage.url} can be written")


def _disk(storage: Storage) -> Check:
    folders = {"/tmp": Path("/tmp")}
    if storage.is_local:
        folder = Path(storage.url)
        while not folder.exists():
            folder = folder.parent
        folders[storage.url] = folder
    free = {name: shutil.disk_usage(folder).free for name, folder in folders.items()}
    found = ", ".join(f"{size / GIB:.1f} GiB free at {name}" for name, size in free.items())
    if min(free.values()) < 5 * GIB:
        return Check("disk", "warn", found, "checkpoints, data and Ray's logs need room; free some or use --storage")
    return Check("disk", "ok", found)


def _ports() -> Check:
    first = ClusterSection().dashboard_port
    port = local.free_dashboard_port(first)
    if port == first:
        return Check("ports", "ok", f"127.0.0.1:{first} is free for the dashboard")
    return Check("ports", "ok", f"127.0.0.1:{first} is in use; an embedded cluster would take {port}")


def _cluster(address_option: str | None) -> Check:
    given = given_address_url(address_option, None)
    if given is None:
        running = local.find()
        if running is None:
            return Check("cluster", "ok", "no embedded cluster runs; `telar submit` starts one")
        url, origin, embedded = running.dashboard_url, "the embedded cluster", True
    else:
        url, origin, embedded = *given, False
    from jobs.submit import Address, Jobs

    jobs = Jobs(Address(url, origin, embedded))
    nodes = jobs.nodes()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    found = f"{url} ({origin}): Ray {jobs.ray_version}, {len(nodes)} nodes, {cpus:g} logical CPUs, {gpus:g} GPUs"
    ours = metadata.version("ray")
    if jobs.ray_version != ours:
        return Check("cluster", "fail", found, f"this client has Ray {ours}; both sides need the same version")
    return Check("cluster", "ok", found)
