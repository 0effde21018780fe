"""`telar checkpoints`: what a run has committed, whether every byte is intact, and one file of all its weights."""

from __future__ import annotations

import json
from typing import Any

from cluster import commit
from cluster.commit import CheckpointError, Committed
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import to_yaml
from jobs.commands.folders import new_folder
from jobs.commands.runs import RunPlace


def list_checkpoints(place: RunPlace, step: int | None = None, verify: bool = False) -> list[dict[str, Any]]:
    """Committed steps, ascending, or `step` alone; each with `problem`, None or what is damaged.

    Without `verify` only COMMIT and MANIFEST are looked at, with it every byte. Raises ConfigError for a step that is
    not committed.
    """
    checkpoints = place.storage.child(place.name, "checkpoints")
    steps = commit.committed_steps(checkpoints)
    if step is not None:
        if step not in steps:
            raise ConfigError(f"--step: {place.url} has no commit of step {step}; it has {steps or 'none'}")
        steps = [step]
    return [_entry(checkpoints, each, verify) for each in steps]


def _entry(checkpoints: Storage, step: int, verify: bool) -> dict[str, Any]:
    try:
        committed = commit.read_commit(checkpoints, step)
        if verify:
            _verify(checkpoints, committed)
    except CheckpointError as error:
        return {"step": step, "verified": False, "problem": str(error)}
    manifest = committed.manifest
    return {
        "step": step,
        "attempt": committed.attempt,
        "ranks": manifest["world_size"],
        "tokens": manifest.get("tokens"),
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "digest": committed.digest,
        "verified": verify,
        "problem": None,
    }


def _verify(checkpoints: Storage, committed: Committed) -> None:
    """Raise CheckpointError unless every file has its digest and every state of a parameter is there to the end."""
    from model.checkpoint import CheckpointReader

    with CheckpointReader(checkpoints, committed) as reader:
        reader.check_complete()


def as_text(place: RunPlace, entries: list[dict[str, Any]]) -> str:
    """A line for each step."""
    if not entries:
        return f"{place.url}: no checkpoint is committed yet"
    lines = [f"{'step':>9}  {'attempt':>7}  {'ranks':>5}  {'tokens':>15}  {'MB':>10}  state"]
    for entry in entries:
        if entry["problem"] is not None:
            lines.append(f"{entry['step']:>9}  damaged: {entry['problem']}")
            continue
        tokens = "" if entry["tokens"] is None else f"{entry['tokens']:,}"
        state = "every byte verified" if entry["verified"] else "committed"
        lines.append(
            f"{entry['step']:>9}  {entry['attempt']:>7}  {entry['ranks']:>5}  {tokens:>15}  "
            f"{entry['bytes'] / 1e6:>10,.1f}  {state}"
        )
    return "\n".join(lines)


def consolidate(place: RunPlace, folder: str, step: int | None = None, average: int = 1) -> dict[str, Any]:
    """Write weights (fp32, full shapes, names of our layers), configuration and tokenizer into the new `folder`.

    Raises ConfigError when it exists or there is no such checkpoint, CheckpointError for a damaged one.
    """
    from safetensors.torch import save_file

    from jobs.loading import load_trained
    from model.quantize import dense_parameters

    config = place.config()
    with new_folder(folder) as made:
        trained = load_trained(place.storage, place.name, config, step, average)
        parameters = {name: tensor.contiguous() for name, tensor in dense_parameters(trained.model).items()}
        facts = {"run": place.url, "steps": list(trained.steps), "data_digest": trained.manifest.digest}
        save_file(parameters, made / "model.safetensors", metadata={"telar": json.dumps(facts)})
        (made / "config.yaml").write_text(to_yaml(config))
        (made / "tokenizer.json").write_bytes(trained.tokenizer.to_bytes())
    count = sum(tensor.numel() for tensor in parameters.values())
    return {"folder": folder, "parameters": count, "tensors": len(parameters), **facts}
