"""DeepSpeed's JIT-compiled CPU operator, built once per machine into a shared cache, or switched off and said so.

On CPU, DeepSpeed's `init_distributed` loads `deepspeed_shm_comm`, an all-reduce through shared memory for tensor
parallel inference, and would compile it in every process at the same time; where no compiler is installed it calls the
operator compatible and fails. So it is built here, before ranks start; ranks load the finished library or skip it.
Training runs the same either way.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

OPERATOR = "deepspeed_shm_comm"
MODE_VARIABLE = "TELAR_OPERATORS"
CACHE_VARIABLE = "TELAR_EXTENSIONS"
BUILD_TIMEOUT_SECONDS = 600

Mode = Literal["shm", "off"]


@dataclass(frozen=True)
class Operators:
    """What `prepare_operators` found: "shm" (the library is there) or "off", one line to show, seconds of building."""

    mode: Mode
    message: str
    build_seconds: float = 0.0


def cache_folder() -> Path:
    """The folder of built operators for this Python, torch, DeepSpeed and kind of processor.

    Below TELAR_EXTENSIONS or ~/.cache/telar/torch_extensions.
    """
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "telar" / "torch_extensions")
    versions = f"torch{metadata.version('torch')}-deepspeed{metadata.version('deepspeed')}"
    processor = hashlib.sha256(_processor_flags().encode()).hexdigest()[:8]
    return root.absolute() / f"{sys.implementation.cache_tag}-{versions}-{platform.machine()}-{processor}"


def library() -> Path:
    """Where the built operator lies once it is complete."""
    return cache_folder() / OPERATOR / f"{OPERATOR}.so"


def prepare_operators() -> Operators:
    """Build the operator unless it is in the cache; safe to call from many processes at once: one of them builds.

    Returns mode "off", with the reason, where a GPU is used (it needs none of this), where a C++ compiler or ninja is
    missing, where the cache cannot be written or where compiling fails. Imports neither torch nor DeepSpeed.
    """
    if Path("/dev/nvidiactl").exists() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return Operators("off", "operators: none needed, ranks run on GPUs")
    if library().exists():
        return Operators("shm", f"operators: {OPERATOR} from {library().parent}")
    environment = _build_environment()
    missing = _missing_tools(environment)
    if missing:
        return Operators("off", f"operators: no {missing} here, going on without {OPERATOR} (collectives use gloo)")
    try:
        with _lock(cache_folder() / f"{OPERATOR}.lock"):
            if library().exists():
                return Operators("shm", f"operators: {OPERATOR} from {library().parent}")
            return _build(environment)
    except OSError as error:
        return Operators("off", f"operators: cannot build in {cache_folder()} ({error}), going on without {OPERATOR}")


def operator_environment(mode: str) -> dict[str, str]:
    """Environment variables of a rank, for the outcome's mode ("shm" or "off")."""
    return {MODE_VARIABLE: mode, "TORCH_EXTENSIONS_DIR": str(cache_folder())}


def load_or_switch_off() -> bool:
    """In a rank, after importing DeepSpeed and before `init_distributed`: True when the operator is in use.

    Without TELAR_OPERATORS=shm, or where its library is not there, DeepSpeed is told that it is not compatible, so
    that it neither looks for a compiler nor builds.
    """
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    if os.environ.get(MODE_VARIABLE) != "shm" or not library().exists():
        deepspeed.ops.__compatible_ops__[OPERATOR] = False
        return False
    if OPERATOR not in OpBuilder._loaded_ops:
        OpBuilder._loaded_ops[OPERATOR] = _import_library(library())
    return True


def _import_library(path: Path) -> ModuleType:
    """Import the extension as it is; DeepSpeed's own loader would run ninja in each rank, behind a lock file that
    outlives a killed process."""
    import torch  # noqa: F401  (its symbols must be loaded first)

    loader = importlib.machinery.ExtensionFileLoader(OPERATOR, str(path))
    spec = importlib.util.spec_from_file_location(OPERATOR, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _build_environment() -> dict[str, str]:
    """The environment of the build: ninja may lie beside the interpreter, which need not be on PATH."""
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join(part for part in (beside, os.environ.get("PATH", "")) if part)
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}


def _missing_tools(environment: dict[str, str]) -> str | None:
    compiler = environment.get("CXX", "c++").split()[0]
    missing = [
        name
        for name, tool in ((f"C++ compiler ({compiler})", compiler), ("ninja", "ninja"))
        if shutil.which(tool, path=environment["PATH"]) is None
    ]
    return " and no ".join(missing) or None


def _build(environment: dict[str, str]) -> Operators:
    """Compile in a process of its own and in a folder of its own, then move the folder into place."""
    work = cache_folder() / f".building-{uuid.uuid4().hex}"
    root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(part for part in (root, environment.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "model.operators"],
            env={**environment, "TORCH_EXTENSIONS_DIR": str(work), "PYTHONPATH": python_path},
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_SECONDS,
            check=False,
        )
        built = work / OPERATOR
        if done.returncode != 0 or not (built / f"{OPERATOR}.so").exists():
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
            return Operators("off", f"operators: {OPERATOR} does not compile here, going on without it: {reason[:300]}")
        built.rename(cache_folder() / OPERATOR)
    except subprocess.TimeoutExpired:
        return Operators("off", f"operators: compiling {OPERATOR} took over {BUILD_TIMEOUT_SECONDS} s, skipped")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = float(done.stdout.strip().splitlines()[-1])
    return Operators("shm", f"operators: built {OPERATOR} in {seconds:.0f} s into {library().parent}", seconds)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """An advisory file lock, which the system releases when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _processor_flags() -> str:
    """What the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile() -> None:
    """Body of the build process: let DeepSpeed's builder compile into TORCH_EXTENSIONS_DIR; prints the seconds."""
    import time

    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    started = time.monotonic()
    ShareMemCommBuilder().jit_load(verbose=False)
    print(time.monotonic() - started)


if __name__ == "__main__":
    _compile()
