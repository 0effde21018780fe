"""Gauges of a run at each node's Ray metrics endpoint, named `ray_telar_*` there and tagged with the run."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

MEANINGS = {
    "loss": "label-smoothed training loss, nats per target token",
    "tokens_per_second": "target tokens trained per second, all ranks",
    "data_wait_seconds": "seconds of the last step spent waiting for data",
    "step_seconds": "seconds of the last optimizer step",
    "learning_rate": "learning rate of the last step",
    "grad_norm": "gradient norm before clipping",
    "step": "optimizer steps done",
    "world_size": "training ranks",
    "attempt": "attempt number",
    "last_commit_step": "step of the last committed checkpoint; absent before the first",
    "last_commit_unix_seconds": "when that was committed",
}


class RunGauges:
    """One gauge per figure of a step record."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"telar_{name}", description=meaning, tag_keys=("run",)) for name, meaning in MEANINGS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def publish(self, figures: dict[str, Any]) -> None:
        """Set the gauges of those figures that have one and are known."""
        for name in self._gauges.keys() & figures.keys():
            if figures[name] is not None:
                self._gauges[name].set(float(figures[name]))
