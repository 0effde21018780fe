"""Which files tasks of lm-evaluation-harness are, and under which key their answers are kept.

The harness's index of all tasks (12.5 s and 13,986 files for each process) is never built. Its caches, whose keys lack
the model, are never used: answers lie under a digest of the checkpoint, the task's files and the harness's version.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

from configs.errors import ConfigError
from jobs.tasks.definitions import is_file

FOLDER = "evaluation/lm_eval"
# lm_eval's own models need accelerate, which lm_eval alone does not bring.
PACKAGES = ("lm_eval", "accelerate")
FORMAT_VERSION = 1


def check_installed(where: str) -> None:
    """Raise ConfigError when lm-evaluation-harness, or what its models need, is not installed here."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"evaluate.lm_eval: {' and '.join(lacking)} cannot be imported on {where}; run "
            "`pip install 'telar[lm-eval]'` there, or leave --lm-eval out"
        )


def task_file(entry: str) -> Path:
    """The YAML of a task: `entry` itself when it names one, else the harness's own file of that name.

    Raises ConfigError when there is none, or several.
    """
    if is_file(entry):
        if not Path(entry).is_file():
            raise ConfigError(f"evaluate.lm_eval: {entry} does not exist; name a YAML file of a task, or a task")
        return Path(entry)
    tasks = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    named = sorted({path for ending in ("yaml", "yml") for path in tasks.rglob(f"{entry}.{ending}")})
    # Most files are named after their task; of the others the line that says so is looked for.
    declaring = [path for path in named or sorted(tasks.rglob("*.yaml")) if _declares(path, entry)]
    if len(declaring) != 1:
        found = ", ".join(str(path.relative_to(tasks)) for path in declaring) or "no file"
        raise ConfigError(
            f"evaluate.lm_eval: {entry!r} is declared by {found} of the installed lm-eval; name a task's YAML file"
        )
    return declaring[0]


def _declares(path: Path, name: str) -> bool:
    with path.open(encoding="utf-8") as lines:
        said = (line.split("#")[0].strip() for line in lines if line.startswith(("task:", "group:")))
        return any(line.split(":", 1)[1].strip().strip("\"'") == name for line in said)


def folder_digest(file: Path) -> str:
    """SHA-256 of a task's file and of the files beside it, which it may include or take functions and rows from."""
    digest = hashlib.sha256(file.name.encode())
    for path in sorted(path for path in file.parent.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def key_of(entry: str, checkpoint_digest: str) -> str:
    """Where a task's answers lie, relative to the run's folder; two checkpoints never share them."""
    check_installed("this machine")
    file = task_file(entry)
    version = importlib.metadata.version("lm_eval")
    content = [FORMAT_VERSION, checkpoint_digest, entry, folder_digest(file), version]
    return f"{FOLDER}/{file.stem}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}.json"
