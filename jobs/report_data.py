"""What the report knows: the files of a run's directory, read once, and training curves without abandoned steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError


@dataclass
class RunFiles:
    """Contents of a run directory; what is absent is empty or None."""

    run: str
    config_text: str
    status: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    compression: dict[str, Any] = field(default_factory=dict)


def read_run(storage: Storage, run: str) -> RunFiles:
    """Read a run's files; raises ConfigError when the run has no config.yaml."""
    folder = storage.child(run)
    try:
        config_text = folder.read_text("config.yaml")
    except FileNotFoundError as error:
        raise ConfigError(f"run {run!r}: no config.yaml in {folder.url}; `telar list` shows the runs there") from error
    candidates = [_json(folder, f"evaluation/{name}.json") for name in ("results", "incomplete")]
    results = max((c for c in candidates if c), key=lambda found: found.get("finished_unix", 0), default=None)
    return RunFiles(
        run=run,
        config_text=config_text,
        status=_json(folder, "status.json"),
        steps=_lines(folder, "metrics.jsonl"),
        events=_lines(folder, "events.jsonl"),
        results=results,
        manifest=_json(folder, "manifest.json"),
        job=_json(folder, "job.json"),
        checkpoints=_checkpoints(folder.child("checkpoints")),
        compression=_json(folder, "compression.json"),
    )


def _json(folder: Storage, path: str) -> dict[str, Any]:
    try:
        return json.loads(folder.read_text(path))
    except FileNotFoundError:
        return {}


def _lines(folder: Storage, path: str) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a last line that a killed writer left unfinished is dropped."""
    try:
        lines = folder.read_text(path).splitlines()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return found


def _checkpoints(folder: Storage) -> list[dict[str, Any]]:
    """Committed steps with their manifest's facts, or the reason why they cannot be used."""
    found = []
    for step in commit.committed_steps(folder):
        try:
            committed = commit.read_commit(folder, step)
        except commit.CheckpointError as error:
            found.append({"step": step, "damaged": str(error)})
            continue
        manifest = committed.manifest
        found.append(
            {
                "step": step,
                "attempt": committed.attempt,
                "bytes": sum(file["bytes"] for file in manifest["files"]),
                "world_size": manifest["world_size"],
                "tokens": manifest.get("tokens"),
                "parameters": manifest.get("parameters"),
                "versions": manifest.get("versions", {}),
                "hardware": manifest.get("hardware"),
                "digest": committed.digest,
            }
        )
    return found


def course(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps that led to the final state, ascending, and the first record of each later attempt.

    An attempt that resumes at step s throws away what earlier attempts did from s on, so those records are dropped.
    """
    kept: list[dict[str, Any]] = []
    restarts: list[dict[str, Any]] = []
    attempt = None
    for record in records:
        if attempt is not None and record["attempt"] != attempt:
            restarts.append(record)
        attempt = record["attempt"]
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept, restarts


def smoothed(values: list[float], half_life: float) -> list[float]:
    """Exponential moving average with the start corrected (Kingma and Ba 2015, section 3); `half_life` in steps."""
    decay = 0.5 ** (1.0 / half_life)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight)
    return result
