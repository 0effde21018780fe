"""Pipeline parallelism: the list of layers cut into stages for DeepSpeed's PipelineEngine, with ZeRO-1.

Each stage is one layer of DeepSpeed's PipelineModule. What is done otherwise than by DeepSpeed 0.19.8: a tuple that
crosses to the next stage is differentiated in one pass, received tensors have buffers of their own (it would take one
of another dtype when shapes vary), and the update waits until all ranks know that the loss is finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from configs.schema import RunConfig
from model.balance import stage_names
from model.batch import ModelBatch
from model.deepspeed_config import deepspeed_config
from model.deepspeed_start import PROCESS_GROUP_TIMEOUT
from model.engine import Engine
from model.loss import LossSums
from model.mesh import Mesh, ParallelContext, new_groups
from model.optimizer import build_optimizer
from model.rounding import round_weights
from model.sliced import mark_copy
from model.transformer import EMBEDDING, Transformer, build_layers


class Stage(Transformer):
    """The layers of one stage; what the last one hands on is what its head takes."""

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the stage before handed on, or the six int tensors of a batch and the dropout key -> what is sent."""
        return self.passed(state)


class StagedModule(PipelineModule):
    """DeepSpeed's module around this rank's stage.

    `embedding_group` are the ranks that share its embedding matrix, None where it has none or nobody else has it.
    """

    def __init__(self, stage: Stage, context: ParallelContext, embedding_group: Any, loss: Any) -> None:
        mesh = context.mesh
        topology = ProcessTopology(axes=["data", "pipe", "model"], dims=[mesh.data, mesh.pipeline, mesh.tensor])
        # Other stages are built elsewhere: here they only have to be counted.
        layers = [stage if at == context.pipeline.rank else nn.Identity() for at in range(mesh.pipeline)]
        self._shared = [] if embedding_group is None else [(stage.embedding.weight, embedding_group)]
        self._copied = embedding_group is not None and stage.names[0] != EMBEDDING
        super().__init__(layers, topology=topology, loss_fn=loss, partition_method="uniform", dynamic_shape=True)

    def _index_tied_modules(self) -> dict[str, Any]:
        # Called when DeepSpeed has marked all parameters as this stage's own.
        if self._copied:
            mark_copy(self._shared[0][0])
        return {}

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """Parameters whose gradients are summed over several stages, each with its process group."""
        return self._shared


class _WithoutUpdate(schedule.TrainSchedule):
    """One forward, one backward pass in turn (1F1B), gradients reduced at the end, nothing updated."""

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, schedule.OptimizerStep)]


class StageEngine(DeepSpeedPipelineEngine):
    """DeepSpeed's engine in two halves: gradients of a global batch, and the update."""

    def differentiate(self, batches: Iterator[Any], count: int) -> None:
        """Gradients of `count` micro-batches `(inputs, labels)`, reduced over replicas."""
        self.module.train()
        self.micro_batches = count
        self.total_loss = None
        self._compute_loss = True
        self.set_dataiterator(batches)
        self._exec_schedule(_WithoutUpdate(count, self.num_stages, self.stage_id))

    def update(self) -> None:
        """The optimizer's step."""
        self._exec_optimizer_step()

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self.is_last_stage():
            super()._exec_backward_pass(buffer_id)
            return
        outputs = [tensor for tensor in self.pipe_buffers["outputs"][buffer_id] if tensor.is_floating_point()]
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads()
        self._running_engine_backward = True
        try:
            torch.autograd.backward(outputs, self.grad_layer)
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads(clear_lp_grads=False)
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    def _allocate_or_extend_buffers(self, idx: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(list(shape), dtype=dtype, device=self.device)

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **DeepSpeedPipelineEngine._INSTRUCTION_MAP,
        schedule.BackwardPass: _exec_backward_pass,
    }


class StageLoss:
    """The loss function that DeepSpeed calls on the last stage; keeps the sums of a global batch."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.begin(0.0)

    def begin(self, factor: float) -> None:
        """A new global batch, whose losses are multiplied by `factor`."""
        self._factor = factor
        self.sums: Tensor | float = 0.0

    def __call__(self, state: tuple[Tensor, ...], labels: tuple[Tensor, Tensor]) -> Tensor:
        """The scalar to differentiate."""
        result: LossSums = self._stage.head(state, *labels)
        self.sums = self.sums + torch.stack((result.loss.detach(), result.nll.detach())).double()
        return result.loss * self._factor


class PipelineEngine(Engine):
    """The engine of a rank that holds one stage of the model; the interface is that of `Engine`."""

    def _differentiate(self, batches: Sequence[ModelBatch], step: int, factor: float) -> Tensor:
        loss = self.deepspeed.module.loss_fn
        loss.begin(factor)
        self.deepspeed.differentiate((_loaded(batch, step) for batch in batches), len(batches))
        return torch.zeros(2, dtype=torch.float64, device=self.device) + loss.sums

    def _update(self) -> None:
        self.deepspeed.update()


def _loaded(batch: ModelBatch, step: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the first and what the last stage take of a micro-batch."""
    part = batch.trimmed()
    return (*part.inputs, torch.tensor([step, batch.index])), (part.labels, part.loss_weight)


def one_stage(
    config: RunConfig, vocabulary_size: int, context: ParallelContext, initial: Mapping[str, Tensor] | None
) -> tuple[Stage, StageEngine]:
    """What this rank has of its stage, and DeepSpeed's engine for it; on all ranks together."""
    train, seed, at = config.train, config.run.seed, context.pipeline.rank
    specs = build_layers(config.model, seed, train.label_smoothing, train.z_loss, context.tensor)
    names = stage_names(config, vocabulary_size)
    stage = Stage([spec for spec in specs if spec.name in names[at]], vocabulary_size, config.model, context.tensor)
    stage.recomputes = train.activation_checkpointing
    round_weights(stage, train)
    stage.begin(seed, initial)
    # Every rank knows which stages use the matrix, and all of them make the groups.
    sharing = embedding_stages(config, names)
    group = new_groups(_sharing_ranks(context.mesh, sharing), PROCESS_GROUP_TIMEOUT) if len(sharing) > 1 else None
    module = StagedModule(stage, context, group, StageLoss(stage))
    settings = deepspeed_config(config)
    engine = StageEngine(
        args=None,
        model=module,
        optimizer=build_optimizer(stage, config.optimizer),
        mpu=module.mpu(),
        config=settings,
        config_class=DeepSpeedConfig(settings, module.mpu()),
    )
    if hasattr(engine.optimizer, "scaled_global_norm"):
        engine.optimizer.scaled_global_norm = partial(_global_norm, engine.optimizer)
    return stage, engine


def _global_norm(optimizer: Any) -> Tensor:
    """L2 norm of the whole model's gradient by one exchange between stages.

    DeepSpeed's own makes one for each parameter group, and stages may have different numbers of these.
    """
    stages, optimizer.model_parallel_group = optimizer.model_parallel_group, None
    try:
        square = type(optimizer).scaled_global_norm(optimizer) ** 2
    finally:
        optimizer.model_parallel_group = stages
    dist.all_reduce(square, group=stages)
    return square.sqrt()


def embedding_stages(config: RunConfig, names: Sequence[Sequence[str]]) -> list[int]:
    """Stages that hold the embedding matrix, given the names of each stage's layers."""
    users = {EMBEDDING, "bridge"}
    if config.model.tie_embeddings and config.model.architecture != "encoder":
        users.add("head")
    return [number for number, own in enumerate(names) if users & set(own)]


def _sharing_ranks(mesh: Mesh, stages: Sequence[int]) -> list[list[int]]:
    """Ranks that hold the same part of the embedding matrix, one line per replica and tensor rank."""
    return [[line[at] for at in stages] for line in mesh.lines("pipeline")]
