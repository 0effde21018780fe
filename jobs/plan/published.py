"""Predictions beside published runs: the same arithmetic as a plan's, told what that run's software did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import parse_config, read_yaml
from configs.schema import RunConfig
from jobs.plan.devices import known_devices
from jobs.plan.flops import training_flops
from jobs.plan.layout import Layout
from jobs.plan.parameters import Shape, parameters_by_part, shape_of
from jobs.plan.step import step_time
from jobs.plan.techniques import Techniques

TABLE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Comparison:
    """One published run; TFLOP/s per device, as the publication counts them."""

    name: str
    source: str
    device: str
    layout: Layout
    recompute: bool
    tokens: int
    parameters: int
    published_parameters: float
    predicted: float
    published: float
    held_out: bool

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted / self.published - 1


def comparisons() -> list[Comparison]:
    """All runs of the table, predicted."""
    devices = known_devices()
    found = []
    for group in read_yaml(TABLE.read_text(encoding="utf-8")):
        for run in group["runs"]:
            config = _config(group, run)
            shape = shape_of(config)
            tensor, pipeline = run.get("tensor", 1), run.get("pipeline", 1)
            device = devices[run["device"]]
            data = run["ranks"] // (tensor * pipeline)
            replicas_first = group.get("replicas_first", False)
            layout = Layout(tensor, pipeline, data, group["zero"], device.gpus_per_node, replicas_first)
            techniques = Techniques(**{**group["techniques"], **{k: run[k] for k in ("recompute",) if k in run}})
            step = step_time(config, shape, layout, device, techniques)
            predicted = step.flops_per_rank * _counted(shape, group["counts"]) / 1e12
            found.append(
                Comparison(
                    run["name"],
                    group["source"],
                    run["device"],
                    layout,
                    techniques.recompute == "full",
                    run["tokens"],
                    sum(parameters_by_part(shape).values()),
                    run["parameters"],
                    predicted,
                    float(run["reported"]),
                    run.get("held_out", False),
                )
            )
    return found


def _counted(shape: Shape, counts: str) -> float:
    """What the publication counts over model FLOPs: layers a fourth time where recomputation counts as work."""
    if counts == "model":
        return 1.0
    flops = training_flops(shape)
    return ((flops.matrices + flops.attention) * 4 / 3 + flops.head) / flops.sample


def _config(group: Mapping[str, Any], run: Mapping[str, Any]) -> RunConfig:
    model = dict(group["model"])
    vocabulary = model.pop("vocabulary")
    return parse_config(
        {
            "data": {
                "corpora": [{"name": "text", "kind": "text", "path": "text", "target": "{text}", "continuation": True}],
                "layout": "sequence",
                "target_tokens": run["tokens"],
                "tokenizer": {"vocabulary_size": vocabulary},
            },
            "model": {
                **model,
                "architecture": "decoder",
                "norm_placement": "pre",
                "d_model": run["d_model"],
                "decoder_layers": run["layers"],
                "heads": run["heads"],
                "key_value_heads": run.get("key_value_heads"),
                "d_ff": run.get("d_ff", 4 * run["d_model"]),
                "max_positions": run["tokens"],
                "dropout": 0.0,
            },
            "train": {
                "steps": 1,
                "global_batch_sequences": run["batch"],
                "micro_batch_sequences": run["micro"],
                "precision": "bf16",
            },
        },
        f"{TABLE}: {run['name']}",
    )
