"""A whole plan: one mapping of plain numbers, from a configuration, a number of devices and a kind of device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.errors import ConfigError
from configs.schema import RunConfig
from jobs.plan.checkpoints import (
    CheckpointCost,
    best_interval,
    checkpoint_cost,
    expected_goodput,
    time_between_failures,
)
from jobs.plan.devices import Device
from jobs.plan.flops import training_flops
from jobs.plan.layout import chosen_layout
from jobs.plan.parameters import Shape, parameters_by_part, shape_of
from jobs.plan.ranking import Candidate, candidate, ranked
from jobs.plan.simulation import Simulation, simulate
from jobs.plan.techniques import Techniques, techniques_of

# Some seconds of computing.
MOST_FAILURES = 1_000_000


@dataclass(frozen=True)
class Question:
    """What is asked: `nodes` None is as many as the configuration's ranks fill; times in seconds."""

    device: Device
    nodes: int | None = None
    gpus_per_node: int | None = None
    techniques: Techniques = field(default_factory=Techniques)
    mtbf: float | None = None
    horizon: float | None = None
    seed: int = 0
    spares: int | None = None


@dataclass(frozen=True)
class Plan:
    """The answer: `facts` for JSON and tables, and simulated runs by what their checkpoint interval is."""

    facts: dict[str, Any]
    simulations: dict[str, Simulation]


def make_plan(config: RunConfig, question: Question) -> Plan:
    """Raises ConfigError where the configuration's own layout takes more devices than there are."""
    shape = shape_of(config)
    device, techniques = question.device, question.techniques
    gpus_per_node = question.gpus_per_node or device.gpus_per_node
    layout = chosen_layout(config, gpus_per_node, question.nodes)
    ranks = layout.ranks if question.nodes is None else question.nodes * gpus_per_node
    if layout.ranks > ranks:
        raise ConfigError(
            f"--nodes: {ranks} devices cannot hold one replica of parallelism.tensor x parallelism.pipeline = "
            f"{layout.tensor * layout.pipeline} ranks; give more nodes"
        )
    chosen = candidate(config, shape, layout, device, techniques)
    layouts = ranked(config, shape, ranks, gpus_per_node, device, techniques)
    subject = chosen if chosen.problem is None or not layouts else layouts[0]
    flops = training_flops(shape)
    parts = parameters_by_part(shape)
    facts: dict[str, Any] = {
        "device": device.model_dump(),
        "nodes": subject.layout.nodes,
        "gpus_per_node": gpus_per_node,
        "ranks": ranks,
        "idle_ranks": ranks - layout.ranks,
        "techniques": techniques.model_dump(),
        "assumed": {
            name: value
            for name, value in techniques.model_dump().items()
            if value != getattr(techniques_of(config), name)
        },
        "parameters": {**parts, "total": sum(parts.values())},
        "flops": {
            "per_token": flops.token,
            "matrices_share": flops.matrices / flops.sample,
            "attention_share": flops.attention / flops.sample,
            "head_share": flops.head / flops.sample,
            "total": float(flops.sample) * config.train.global_batch_sequences * config.train.steps,
        },
        "chosen": chosen.as_dict(),
        "layouts": [one.as_dict() for one in layouts],
        "subject": {
            **subject.as_dict(),
            "why": "chosen" if subject is chosen else "fastest" if subject.problem is None else "smallest",
            "settings": subject.layout.settings,
        },
        "run": _run(config, shape, subject, device),
    }
    cost = checkpoint_cost(config, shape, subject.layout, device)
    facts["checkpoints"], mtbf = _checkpoints(config, subject, cost, question.mtbf)
    facts["data"] = _data(config, shape, subject)
    simulations: dict[str, Simulation] = {}
    if question.horizon is not None:
        if question.horizon > MOST_FAILURES * mtbf:
            raise ConfigError(
                f"--simulate: {question.horizon / mtbf:.3g} failures would take long; ask for a shorter time or a "
                f"longer --mtbf, {MOST_FAILURES:,} failures at most"
            )
        facts["simulation"] = {}
        for name, field_name in {"configured": "interval_seconds", "best": "best_interval_seconds"}.items():
            interval = facts["checkpoints"][field_name]
            run = simulate(question.horizon, interval, cost, mtbf, subject.layout.nodes, question.seed, question.spares)
            simulations[name] = run
            expected = expected_goodput(interval, cost, mtbf)
            facts["simulation"][name] = {
                **run.as_dict(),
                "expected_goodput": expected,
                "interval_seconds": interval,
            }
    return Plan(facts, simulations)


def _run(config: RunConfig, shape: Shape, subject: Candidate, device: Device) -> dict[str, float]:
    step, ranks = subject.step, subject.layout.ranks
    seconds = step.seconds * config.train.steps
    return {
        "steps": config.train.steps,
        "tokens_per_step": step.tokens,
        "tokens": step.tokens * config.train.steps,
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_second_per_gpu": step.tokens_per_second / ranks,
        "tflops_per_gpu": step.flops_per_rank / 1e12,
        "mfu": step.utilisation,
        "seconds": seconds,
        "gpu_hours": seconds / 3600 * ranks,
        # Boards at their rated power; hosts, network and cooling come on top.
        "energy_kwh": seconds / 3600 * ranks * device.watts / 1000,
    }


def _checkpoints(
    config: RunConfig, subject: Candidate, cost: CheckpointCost, mtbf: float | None
) -> tuple[dict[str, Any], float]:
    """What the plan says of checkpoints, and the time between failures that it is for."""
    given = mtbf is not None
    mtbf = mtbf if mtbf is not None else time_between_failures(subject.layout)
    interval = config.checkpoint.every_steps * subject.step.seconds
    # Not shorter than a step, not longer than the run.
    best = min(max(subject.step.seconds, best_interval(cost, mtbf)), subject.step.seconds * config.train.steps)
    found = {
        "bytes": cost.bytes,
        "bytes_per_node": cost.bytes / subject.layout.nodes,
        "stall_seconds": cost.stall,
        "upload_seconds": cost.lag,
        "restart_seconds": cost.restart,
        "mtbf_seconds": mtbf,
        "mtbf_given": given,
        "interval_steps": config.checkpoint.every_steps,
        "interval_seconds": interval,
        "goodput": expected_goodput(interval, cost, mtbf),
        "best_interval_steps": max(1, round(best / subject.step.seconds)),
        "best_interval_seconds": best,
        "best_goodput": expected_goodput(best, cost, mtbf),
    }
    return found, mtbf


def _data(config: RunConfig, shape: Shape, subject: Candidate) -> dict[str, float]:
    """Prepared samples of full length as shards hold them: two bytes per token of vocabularies to 65,536, else four."""
    width = 2 if shape.vocabulary <= 1 << 16 else 4
    sample = shape.tokens * width
    layout = subject.layout
    samples = config.train.global_batch_sequences * config.train.steps
    per_second = config.train.global_batch_sequences / subject.step.seconds
    return {
        "bytes_per_token": width,
        "samples": samples,
        "shards": -(-samples // config.data.shard_rows),
        "bytes": samples * sample,
        "node_bytes_per_second": per_second * sample / layout.data * layout.replicas_per_node,
    }
