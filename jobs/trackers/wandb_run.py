"""Curves for Weights & Biases: one W&B run for all attempts and resumes.

The key (WANDB_API_KEY), the server (WANDB_BASE_URL) and the mode (WANDB_MODE=offline writes files that `wandb sync`
uploads later) are read by W&B itself from the environment of the controller's node.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import wandb

from cluster.storage import Storage
from jobs.trackers.base import Ids

# W&B's own step only rises; figures are drawn over this one, which goes back after a restart.
STEP = "step"


class WandbRun:
    """One W&B run. Its id is chosen here, so that it is kept before W&B is asked for anything."""

    errors = (wandb.Error, OSError)

    def __init__(self, folder: Storage, run: str, project: str, kept: Ids, settings: Mapping[str, Any]) -> None:
        known = kept.read().get("wandb")
        if known is None:
            known = secrets.token_hex(8)
            kept.keep("wandb", known)
        self._run = wandb.init(
            id=known,
            name=run,
            project=project,
            resume="allow",
            dir=folder.local_path(),
            config=dict(settings),
            # Telar's own logs are in storage; nothing of this process's output, code or machine goes out.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("train/*", step_metric=STEP)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One row with all figures of a step."""
        self._run.log({STEP: step, **{f"train/{name}": value for name, value in figures.items()}})

    def close(self, state: str) -> None:
        """Upload what is left; in offline mode, close the file."""
        self._run.finish(exit_code=1 if state == "failed" else 0)
