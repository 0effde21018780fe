"""All layouts of so many ranks, each with its memory and step time, best first."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.plan.devices import Device
from jobs.plan.layout import Layout, legal_layouts, problem
from jobs.plan.memory import USABLE, Memory, rank_memory
from jobs.plan.parameters import Shape
from jobs.plan.step import StepTime, step_time
from jobs.plan.techniques import Techniques

GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A layout with what it takes; `problem` says why the model cannot run in it, None if it can."""

    layout: Layout
    memory: Memory
    step: StepTime
    problem: str | None

    def as_dict(self) -> dict[str, object]:
        """Plain numbers: bytes, seconds."""
        layout, memory, step = self.layout, self.memory, self.step
        return {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "zero": layout.zero,
            "problem": self.problem,
            "memory_bytes": {
                "parameters": memory.parameters,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "activations": memory.activations,
                "workspace": memory.workspace,
                "total": memory.total,
            },
            "step_seconds": {
                "matrices": step.matrices,
                "attention": step.attention,
                "memory": step.memory,
                "launch": step.launch,
                "head": step.head,
                "optimizer": step.optimizer,
                **{flow.name: flow.seconds for flow in step.flows},
                "bubble": step.bubble,
                "stragglers": step.stragglers,
                "total": step.seconds,
            },
            "communication": [
                {"name": flow.name, "link": flow.link, "bytes_per_rank": flow.bytes, "seconds": flow.seconds}
                for flow in step.flows
            ],
            "bubble_share": step.bubble_share,
            "tokens_per_second": step.tokens_per_second,
            "mfu": step.utilisation,
        }


def candidate(config: RunConfig, shape: Shape, layout: Layout, device: Device, techniques: Techniques) -> Candidate:
    """One layout, weighed."""
    memory = rank_memory(config, shape, layout, techniques)
    return Candidate(
        layout,
        memory,
        step_time(config, shape, layout, device, techniques),
        problem(config, layout) or _too_much(memory, device),
    )


def ranked(
    config: RunConfig, shape: Shape, ranks: int, gpus_per_node: int, device: Device, techniques: Techniques
) -> list[Candidate]:
    """Legal layouts of exactly `ranks` ranks: those that fit, fastest first, then the others, smallest first."""
    found = [
        candidate(config, shape, layout, device, techniques) for layout in legal_layouts(config, ranks, gpus_per_node)
    ]
    return sorted(found, key=_order)


def _order(one: Candidate) -> tuple[bool, float, int]:
    fits = one.problem is None
    return not fits, one.step.seconds if fits else one.memory.total, one.layout.zero


def _too_much(memory: Memory, device: Device) -> str | None:
    room = device.memory_bytes * USABLE
    if memory.total <= room:
        return None
    parts = {name: getattr(memory, name) for name in ("parameters", "gradients", "optimizer", "activations")}
    most = max(parts, key=parts.__getitem__)
    return f"{memory.total / GIB:,.0f} of {room / GIB:,.0f} GiB, most of it {most} ({parts[most] / GIB:,.0f})"
