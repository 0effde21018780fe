"""Memory of ranks against what `telar plan` predicts: `python -m tests.bench.memory`; prints a table, writes one JSON.

A model of some 60 million parameters (6 + 6 layers of width 512) in real processes over gloo. Weighed are the bytes of
tensors that a rank holds in its second step of two micro-batches: parameters, optimizer states, and of the rest, which
is gradients and the buffers that they travel in, the most at three moments. Of the ranks, the fullest counts.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from configs.load import parse_config
from configs.schema import RunConfig
from jobs.machine import hardware, versions
from jobs.plan.layout import Layout
from jobs.plan.memory import BUCKET_BYTES, rank_memory
from jobs.plan.parameters import shape_of
from jobs.plan.techniques import Techniques
from tests.gloo_pool import GlooPool

VOCABULARY = 30_000
# Replicas, stages, tensor ranks, ZeRO stage.
LAYOUTS = (
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (2, 1, 1, 2),
    (2, 1, 1, 3),
    (4, 1, 1, 1),
    (4, 1, 1, 2),
    (4, 1, 1, 3),
    (1, 1, 2, 1),
    (1, 2, 1, 1),
    (1, 2, 2, 1),
    (2, 1, 2, 1),
    (2, 1, 2, 3),
)


def make_tree(data: int, pipeline: int, tensor: int, zero: int, precision: str, d_model: int = 512) -> dict[str, Any]:
    """The configuration of one cell: no data, two micro-batches of 3 rows per replica."""
    return {
        "run": {"name": "memory"},
        "cluster": {"device": "cpu"},
        "data": {
            "corpora": [{"name": "none", "kind": "text", "path": "/nowhere", "target": "{text}"}],
            "tokenizer": {"vocabulary_size": VOCABULARY},
            "source_tokens": 11,
            "target_tokens": 9,
        },
        "model": {
            "d_model": d_model,
            "heads": 8,
            "d_ff": 4 * d_model,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "dropout": 0.0,
        },
        "parallelism": {"data": data, "pipeline": pipeline, "tensor": tensor, "zero_stage": zero},
        "train": {
            "steps": 2,
            "global_batch_sequences": 6 * data,
            "micro_batch_sequences": 3,
            "precision": precision,
        },
    }


def weigh(tree: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's parameters and optimizer states, and the most that the rest takes in the second step."""
    from model.engine import create_engine
    from tests.test_engine import make_batch

    gc.collect()
    # Kept alive, or others would get their addresses.
    present = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    before = set(_storages(present))
    engine = create_engine(parse_config(tree, "bench"), VOCABULARY, 0)
    found: dict[str, int] = {"rest": 0}

    def weighed(function: Any, after: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options) if after else None
            gc.collect()
            parts = {"parameters": _storages(_parameters(engine.module)), "optimizer": _storages(_states(engine))}
            # A gradient that only its parameter holds is no object of Python before somebody asks for it.
            everything = _storages([*gc.get_objects(), *(each.grad for each in engine.module.parameters())])
            found.update({name: sum(part.values()) for name, part in parts.items()})
            counted = before.union(*parts.values())
            rest = sum(size for address, size in everything.items() if address not in counted)
            found["rest"] = max(found["rest"], rest)
            return result if after else function(*arguments, **options)

        return call

    look = weighed(lambda: None, after=True)

    def watch(outputs: Any) -> None:
        tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: look())

    replica = engine.context.data.rank
    batches = [[make_batch(2 * replica + i, step) for i in (0, 1)] for step in (1, 2)]
    engine.train_step(batches[0], 1, 1e-3)
    # When the backward pass has reached the first layer, between two micro-batches, and before the update.
    first = engine.module.layers()[0]
    first.register_forward_hook(lambda _module, _inputs, outputs: watch(outputs))
    engine.deepspeed.backward = weighed(engine.deepspeed.backward, after=True)
    engine._update = weighed(engine._update, after=False)
    engine.train_step(batches[1], 2, 1e-3)
    engine.close()
    return found


def _storages(things: Any) -> dict[int, int]:
    """Bytes by address of the storages of all tensors among `things`."""
    # isinstance would ask lazy modules of other packages for their class, and import them.
    tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta"]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def _parameters(module: torch.nn.Module) -> list[Any]:
    parameters = list(module.parameters())
    return [*parameters, *(getattr(each, "ds_tensor", None) for each in parameters)]


def _states(engine: Any) -> list[Any]:
    optimizer = engine.deepspeed.optimizer
    inner = optimizer.optimizer
    # Between steps ZeRO-3 keeps the master partitions of its groups apart from them.
    held = [each for group in inner.param_groups for each in group["params"]]
    held += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    return held + [value for state in inner.state.values() for value in state.values()]


def predicted(config: RunConfig) -> dict[str, float]:
    """What the plan says of the same; what else it counts as workspace has gone when gradients are complete."""
    ranks = config.parallelism
    memory = rank_memory(
        config, shape_of(config), Layout(ranks.tensor, ranks.pipeline, ranks.data, ranks.zero_stage, 8), Techniques()
    )
    in_place = ranks.zero_stage == 1 and config.train.precision == "bf16"
    head = 4 * VOCABULARY * config.model.d_model / ranks.tensor
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "rest": memory.gradients + (0 if in_place else BUCKET_BYTES) + head,
    }


def measure(pool: GlooPool, layout: tuple[int, int, int, int], precision: str, d_model: int = 512) -> dict[str, Any]:
    """One row of the table: measured and predicted bytes of the fullest rank."""
    tree = make_tree(*layout, precision, d_model)
    weighed = pool.run(math.prod(layout[:3]), weigh, tree)
    fullest = max(weighed, key=lambda each: sum(each.values()))
    return {
        "layout": layout,
        "precision": precision,
        "measured": fullest,
        "predicted": predicted(parse_config(tree, "x")),
    }


def line(row: dict[str, Any]) -> str:
    """The row in Markdown, MiB; the last column is prediction over measurement."""
    data, pipeline, tensor, zero = row["layout"]
    cells = [f"DP{data} PP{pipeline} TP{tensor} ZeRO-{zero}", row["precision"]]
    for part in ("parameters", "optimizer", "rest"):
        cells.append(f"{row['measured'][part] / 2**20:,.0f} / {row['predicted'][part] / 2**20:,.0f}")
    totals = [sum(row[side].values()) for side in ("measured", "predicted")]
    cells += [f"{totals[0] / 2**20:,.0f} / {totals[1] / 2**20:,.0f}", f"{totals[1] / totals[0]:.3f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=__doc__)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/memory.json"))
    options = parser.parse_args()
    head = ("layout", "precision", "parameters", "optimizer", "gradients, buffers", "all", "predicted / measured")
    print("MiB on the fullest rank, measured / predicted\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    rows = []
    for precision in options.precision.split(","):
        for layout in LAYOUTS:
            # A process keeps what DeepSpeed does not let go of, so each cell has new ones.
            pool = GlooPool()
            try:
                rows.append(measure(pool, layout, precision))
            finally:
                pool.close()
            print(line(rows[-1]), flush=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(),
        "bucket_bytes": BUCKET_BYTES,
        "rows": rows,
        "versions": versions(),
        "hardware": hardware(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
