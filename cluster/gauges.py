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
}


class RunGauges:
    """One gauge per figure of a step record."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"telar_{name}", description=meaning, tag_keys=("run",)) for name, meaning in MEANINGS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def publish(self, record: dict[str, Any]) -> None:
        """Set every gauge from one step record."""
        for name, gauge in self._gauges.items():
            gauge.set(float(record[name]))
