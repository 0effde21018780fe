"""Where a run lies and what its files say: names and URLs, status.json, its lease, the last metrics."""

from __future__ import annotations

import difflib
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.storage import Storage, absolute_url
from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import RunConfig
from jobs import run_view

TERMINAL, LEASE_SECONDS = run_view.TERMINAL, run_view.LEASE_SECONDS


@dataclass(frozen=True)
class RunPlace:
    """A run: the storage that holds it and its name there."""

    storage: Storage
    name: str

    @property
    def url(self) -> str:
        """The folder or URL of the run."""
        return f"{self.storage.url}/{self.name}"

    def config(self) -> RunConfig:
        """The run's resolved configuration."""
        return parse_config(
            yaml.safe_load(self.storage.read_text(f"{self.name}/config.yaml")), f"{self.url}/config.yaml"
        )

    def status(self) -> dict[str, Any] | None:
        """Content of status.json, or None before the controller wrote it."""
        try:
            return json.loads(self.storage.read_text(f"{self.name}/status.json"))
        except FileNotFoundError:
            return None


def storage_for(option: str | None, config: RunConfig | None = None) -> Storage:
    """The storage in use; see `storage_url_for`."""
    return Storage(storage_url_for(option, config))


def storage_url_for(option: str | None, config: RunConfig | None = None) -> str:
    """Its URL: --storage, TELAR_STORAGE, run.storage, `runs`; relative ones from the current folder."""
    url = option or os.environ.get("TELAR_STORAGE") or (config.run.storage if config else None) or "runs"
    return absolute_url(url)


def locate(run: str, storage_option: str | None) -> RunPlace:
    """The place of a run given by name or URL; raises ConfigError when there is no such run."""
    if "/" in run:
        parent, _, name = absolute_url(run).rpartition("/")
        place = RunPlace(Storage(parent), name)
    else:
        place = RunPlace(storage_for(storage_option), run)
    if not place.storage.exists(f"{place.name}/config.yaml"):
        known = names(place.storage)
        near = difflib.get_close_matches(place.name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it holds {len(known)} runs; `telar list` names them"
        raise ConfigError(
            f"RUN: no run {place.name!r} in {place.storage.url}; {hint} Another storage is chosen with --storage or "
            "TELAR_STORAGE, or give the run's whole URL"
        )
    return place


def names(storage: Storage) -> list[str]:
    """Names of the runs in a storage, sorted."""
    return [name for name in storage.names() if name != "data" and storage.exists(f"{name}/config.yaml")]


def state_of(status: dict[str, Any] | None) -> str:
    """The state of a run now; see `jobs.run_view.state_of`."""
    return run_view.state_of(status, time.time())


def summary(name: str, status: dict[str, Any] | None) -> str:
    """Two or three lines about a run, for people."""
    state = state_of(status)
    if status is None:
        return f"{name}  {state}"
    head = f"{name}  {state}"
    if state == "silent":
        head += f" for {time.time() - status['updated_unix']:.0f} s (was {status['state']})"
    if status.get("attempt"):
        head += f"  attempt {status['attempt']}"
    step, steps = status.get("step") or 0, status.get("steps") or 0
    if steps:
        head += f"  step {step:,}/{steps:,} ({step / steps:.0%})"
    lines = [head]
    if status.get("loss") is not None:
        line = f"loss {status['loss']:.3f}  tokens {status.get('tokens') or 0:,}"
        if status.get("tokens_per_second"):
            line += f"  tok/s {status['tokens_per_second']:,.0f}"
        line += f"  world {status.get('world_size')}"
        if status.get("last_commit_step") is not None:
            line += f"  last checkpoint step {status['last_commit_step']:,}"
        lines.append(line)
    if status.get("status_page_url") and state not in TERMINAL:
        lines.append(f"status page {status['status_page_url']}")
    if status.get("message"):
        lines.append(str(status["message"]))
    return "\n".join(lines)
