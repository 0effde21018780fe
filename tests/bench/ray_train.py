"""What a user of Ray Train would write: an elastic TorchTrainer with checkpoints, as a driver process of its own.

`python -m tests.bench.ray_train ADDRESS FOLDER CONFIG`: the model of a Telar configuration under PyTorch's
DistributedDataParallel (no engine of DeepSpeed has to start again), over random tokens in memory. Leaves the processes
of every attempt in FOLDER/ranks.jsonl and rank 0's steps in FOLDER/steps.jsonl; ends when there is a FOLDER/stop.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.load import load_config

STOP, RANKS, STEPS = "stop", "ranks.jsonl", "steps.jsonl"


def append(path: Path, record: dict[str, Any]) -> None:
    """One line, whole."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def train_rank(settings: dict[str, str]) -> None:
    """Train until asked to stop, from the last reported checkpoint on; the global batch has one size at any world size.

    As in Ray's guide: state_dict of model and optimizer, saved by rank 0, reported by all.
    """
    import ray
    import torch
    import torch.distributed as dist
    from ray import train

    from model.transformer import build_model
    from tests.bench.checkpoint import make_batch

    torch.set_num_threads(1)
    folder, config = Path(settings["folder"]), load_config(settings["config"])
    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    attempt = [time.time()]
    dist.broadcast_object_list(attempt)
    node = ray.get_runtime_context().get_node_id()
    append(folder / RANKS, {"attempt": attempt[0], "rank": rank, "pid": os.getpid(), "node": node})
    vocabulary, section = config.data.tokenizer.vocabulary_size, config.train
    model = train.torch.prepare_model(build_model(config.model, vocabulary, config.run.seed, section.label_smoothing))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=config.optimizer.betas, fused=True)
    step, found = 0, train.get_checkpoint()
    if found is not None:
        with found.as_directory() as place:
            state = torch.load(Path(place) / "state.pt", weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    micro_batches = section.global_batch_sequences // section.micro_batch_sequences
    mine = [make_batch(config, index, vocabulary) for index in range(rank, micro_batches, world)]
    while True:
        step += 1
        for number, batch in enumerate(mine, 1):
            model.require_backward_grad_sync = number == len(mine)
            result = model(batch.inputs, torch.tensor([step, batch.index]), batch.labels, batch.loss_weight)
            (result.loss * world / (micro_batches * batch.labels.numel())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            record = {"attempt": attempt[0], "step": step, "world_size": world, "unix_seconds": time.time()}
            append(folder / STEPS, record)
        asked = torch.tensor(float((folder / STOP).exists()))
        dist.all_reduce(asked)
        if asked:
            return
        if step % config.checkpoint.every_steps == 0:
            with tempfile.TemporaryDirectory() as place:
                if rank == 0:
                    states = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(states, Path(place) / "state.pt")
                train.report({}, checkpoint=train.Checkpoint.from_directory(place) if rank == 0 else None)


def main() -> int:
    """Train; Ray Train's own settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ray_train", description=__doc__)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("config")
    parser.add_argument("--monitor-seconds", type=float, default=60.0)
    options = parser.parse_args()
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=options.address, log_to_driver=False)
    config = load_config(options.config)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"folder": str(options.folder), "config": options.config},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=(config.min_replicas, config.max_replicas),
            elastic_resize_monitor_interval_s=options.monitor_seconds,
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(options.folder),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
