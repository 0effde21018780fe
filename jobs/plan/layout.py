"""How ranks share a model: tensor x pipeline x data and a ZeRO stage; which are legal, and why others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.schema import RunConfig
from jobs.plan.parameters import shape_of


@dataclass(frozen=True)
class Layout:
    """Ranks along each way of sharing, `gpus_per_node` of them in a node.

    Neighbours are tensor ranks, then pipeline stages, then replicas, as `model.mesh` numbers them: a replica stays in
    as few nodes as it can. With `replicas_first` replicas come before stages, as in Megatron-LM (of published runs).
    """

    tensor: int
    pipeline: int
    data: int
    zero: int
    gpus_per_node: int
    replicas_first: bool = False

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold the model once."""
        return self.tensor * self.pipeline

    @property
    def nodes(self) -> int:
        """Nodes that they fill."""
        return -(-self.ranks // self.gpus_per_node)

    @property
    def replicas_per_node(self) -> int:
        """Replicas that have ranks of one stage in the same node."""
        between = self.tensor if self.replicas_first else self.ranks_per_replica
        return max(1, min(self.data, self.gpus_per_node // between))

    @property
    def stages_in_node(self) -> bool:
        """Whether all stages of a replica lie in one node."""
        return (self.ranks if self.replicas_first else self.ranks_per_replica) <= self.gpus_per_node

    @property
    def replicas_in_node(self) -> bool:
        """Whether all ranks that hold the same part of the model lie in one node."""
        return (self.tensor * self.data if self.replicas_first else self.ranks) <= self.gpus_per_node

    @property
    def settings(self) -> str:
        """The `--set` options that ask for it."""
        fields = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data, "zero_stage": self.zero}
        return " ".join(f"--set parallelism.{name}={value}" for name, value in fields.items())

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}, ZeRO-{self.zero}"


def micro_batches(config: RunConfig) -> int:
    """Micro-batches of one optimizer step, all replicas together."""
    return config.train.global_batch_sequences // config.train.micro_batch_sequences


def chosen_layout(config: RunConfig, gpus_per_node: int, nodes: int | None) -> Layout:
    """The configured layout; where `nodes` are given its replicas are as many as fill them (1 at least)."""
    section = config.parallelism
    tensor, pipeline, data = section.tensor, section.pipeline, section.data
    if nodes is not None:
        data = max(1, nodes * gpus_per_node // (tensor * pipeline))
    return Layout(tensor, pipeline, data, config.parallelism.zero_stage, gpus_per_node)


def problem(config: RunConfig, layout: Layout) -> str | None:
    """Why the model cannot run in this layout, apart from memory; None if it can."""
    model, tensor, pipeline = config.model, layout.tensor, layout.pipeline
    for field, size in (("heads", model.heads), ("key_value_heads", model.heads_of_keys), ("d_ff", model.d_ff)):
        if size % tensor:
            return f"model.{field} = {size} does not divide over {tensor} tensor ranks"
    if tensor > layout.gpus_per_node:
        return f"{tensor} tensor ranks do not fit into a node of {layout.gpus_per_node}"
    layers = shape_of(config).layers
    if pipeline > layers:
        return f"{pipeline} pipeline stages for {layers} layers"
    if pipeline > 1 and layout.zero > 1:
        return "DeepSpeed's pipeline works with ZeRO-1 only"
    count = micro_batches(config)
    if layout.data > count:
        return f"{layout.data} replicas share {count} micro-batches a step: some would idle"
    return None


def legal_layouts(config: RunConfig, ranks: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout of exactly so many ranks that `problem` allows."""
    for tensor in _divisors(ranks):
        for pipeline in _divisors(ranks // tensor):
            for zero in (1, 2, 3):
                layout = Layout(tensor, pipeline, ranks // tensor // pipeline, zero, gpus_per_node)
                if problem(config, layout) is None:
                    yield layout


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
