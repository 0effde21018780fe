"""What travels with a job: the repository as working directory, environment variables, and the code's fingerprint.

Every process of a job checks at its start that it runs the code that was submitted. An installed copy of the five
packages, or another folder that comes first on the path, would otherwise run silently in its place.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import TelarError
from configs.schema import RunConfig

PACKAGES = ("configs", "cluster", "data", "model", "jobs")
ROOT = Path(__file__).resolve().parent.parent
FINGERPRINT_VARIABLE = "TELAR_FINGERPRINT"
# Set by `telar submit`: the Jobs API's submission id, which Ray does not tell the entrypoint, and the dashboard's URL.
JOB_ID_VARIABLE = "TELAR_JOB_ID"
DASHBOARD_VARIABLE = "TELAR_DASHBOARD_URL"


def fingerprint(root: Path = ROOT) -> str:
    """16 hex digits over the names and contents of all `.py` files of the five packages below `root` (XXH3-64)."""
    digest = xxhash.xxh3_64()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def environment_variables(config: RunConfig) -> dict[str, str]:
    """Environment of every process of the job."""
    return {
        FINGERPRINT_VARIABLE: fingerprint(),
        "OMP_NUM_THREADS": str(config.train.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def runtime_env(config: RunConfig) -> dict[str, Any]:
    """The job's runtime environment; what `.rayignore` names is left out of the upload."""
    return {"working_dir": str(ROOT), "env_vars": environment_variables(config)}


def check_fingerprint() -> None:
    """Raise TelarError unless this process imports the five packages from the job's working directory, unchanged.

    A process outside a job (no TELAR_FINGERPRINT in its environment) has nothing to compare with and passes.
    """
    expected = os.environ.get(FINGERPRINT_VARIABLE)
    if expected is None:
        return
    shipped = Path.cwd().resolve()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != shipped:
            raise TelarError(
                f"package {package!r} would be imported from {found}, the job shipped it in {shipped}; an installed "
                "copy or a PYTHONPATH comes first there: uninstall telar on that node or clear PYTHONPATH"
            )
    actual = fingerprint(shipped)
    if actual != expected:
        raise TelarError(
            f"the code in {shipped} (fingerprint {actual}) is not the code that was submitted from the repository "
            f"(fingerprint {expected}); submit again, and do not edit files while `telar submit` uploads them"
        )
