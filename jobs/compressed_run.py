"""The files of a run that was made by compressing another one: configuration, references, status, a checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from cluster import commit
from cluster.commit import Committed
from cluster.storage import Storage
from configs.load import parse_config, to_yaml
from configs.schema import ModelSection, RunConfig
from jobs.compression import Compression
from jobs.references import NAME as REFERENCES
from model.checkpoint import write_snapshot
from model.fragments import WEIGHT, Fragment

# Says of a run how it was compressed and what that changed.
RECORD = "compression.json"


def compressed_config(
    config: RunConfig, name: str, section: ModelSection, steps: int, rounded: str | None = None
) -> RunConfig:
    """The new run's configuration: its name, its model, training that ends where it is; one checkpoint, no mean.

    `rounded` is its `train.quantize`.

    It trains as one process: what is compressed fits one, and pruned sizes may not divide over the ranks of before.
    """
    tree = json.loads(config.model_dump_json())
    tree["run"]["name"] = name
    tree["model"] = {**json.loads(section.model_dump_json()), "init_from": None}
    tree["train"] |= {"steps": steps, "quantize": rounded}
    tree["evaluate"]["average_checkpoints"] = 1
    tree["parallelism"] |= {"data": 1, "tensor": 1, "pipeline": 1}
    tree["elastic"] |= {"min_replicas": None, "max_replicas": None}
    return parse_config(tree, f"the compressed run {name}")


def write_compressed(
    storage: Storage,
    run: str,
    name: str,
    config: RunConfig,
    source: Committed,
    pieces: list[Fragment],
    compression: Compression | None,
) -> None:
    """The new run's files, config.yaml last: it makes the folder a run. What is half written is removed.

    Without a `compression` it is a copy that is to go on training.
    """
    folder, step = storage.child(name), source.step
    origin = {"run": run, "step": step, "checkpoint_digest": source.digest}
    try:
        file = write_snapshot(folder.child("checkpoints"), step, 1, 0, pieces)
        own = ("format", "step", "attempt", "world_size", "files")
        extra = {key: value for key, value in source.manifest.items() if key not in own}
        shapes = {piece.name: piece.tensor.numel() for piece in pieces if piece.state == WEIGHT}
        extra.update(run=name, model=config.model.model_dump(mode="json"), source=origin)
        if compression is None or compression.quantize is None:
            extra["parameters"] = sum(shapes.values())
        if compression is not None:
            described = {"label": compression.label, **asdict(compression)}
            extra["compression"] = described
            folder.write_text(RECORD, json.dumps({"compression": described, "source": origin}, indent=1))
        commit.commit(folder.child("checkpoints"), step, 1, [file], 1, extra)
        if storage.exists(f"{run}/{REFERENCES}"):
            folder.write_bytes(REFERENCES, storage.read_bytes(f"{run}/{REFERENCES}"))
        folder.write_text("status.json", json.dumps(_status(name, config, step, source), indent=1))
        folder.write_text("config.yaml", to_yaml(config))
    except BaseException:
        storage.remove(name)
        raise


def _status(name: str, config: RunConfig, step: int, source: Committed) -> dict[str, Any]:
    now = time.time()
    return {
        "run": name,
        "state": "finished" if step >= config.train.steps else "stopped",
        "stage": None,
        "step": step,
        "steps": config.train.steps,
        "tokens": source.manifest.get("tokens", 0),
        "loss": None,
        "tokens_per_second": None,
        "data_wait_seconds": None,
        "world_size": 0,
        "attempt": 1,
        "last_commit_step": step,
        "message": None,
        "updated_unix": now,
        "started_unix": now,
    }
