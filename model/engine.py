"""One rank's training engine over DeepSpeed: forward, backward and update of whole optimizer steps.

What is promised beyond DeepSpeed: the loss is a mean over the target tokens of the global batch, however its
micro-batches are spread over ranks; the stop flag is agreed by all ranks; a step that is not finite is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import RunConfig
from model.batch import ModelBatch
from model.deepspeed_config import deepspeed_config
from model.deepspeed_start import PROCESS_GROUP_TIMEOUT, choose_device, import_deepspeed, join_process_group, quiet
from model.fragments import muon_pieces
from model.mesh import Mesh, ModelParallelUnit, ParallelContext, join
from model.muon import MuonAdamW
from model.optimizer import build_optimizer
from model.rounding import round_weights
from model.step import StepResult, agree, check_finite
from model.transformer import Transformer, build_layers, parameter_shapes


class Engine:
    """The model and its share of the optimizer state on this rank; all methods are called on all ranks together.

    `module` holds this rank's parameters under their global names, `shapes` the full shapes of all that the model has.
    """

    def __init__(
        self,
        module: Transformer,
        engine: Any,
        device: torch.device,
        context: ParallelContext,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.module, self.deepspeed, self.device, self.context = module, engine, device, context
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shapes = dict(shapes)
        self.parameter_count = sum(math.prod(shape) for shape in self.shapes.values())

    def train_step(
        self,
        batches: Sequence[ModelBatch],
        step: int,
        learning_rate: float,
        stop: bool = False,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Train on this replica's micro-batches of the global batch, equally many on each (fill with zero-weight).

        All ranks of one replica are given the same. `step` counts from 1 and seeds dropout together with each
        micro-batch's index. No rank updates anything before all have returned from `before_update`, which is called
        with the gradients there. Raises TrainingError, before anything is updated when the loss is not finite.
        """
        agreed = agree(batches, step, stop, self.context, self.device)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed averages gradients over replicas; the factor turns that into the sum over the global batch.
        sums = self._differentiate(batches, step, self.context.data.size / agreed.weight)
        before_update()
        # All ranks hear the same numbers, so that all go on or none does; tensor ranks of a replica count as one.
        sums *= self.context.counts
        dist.all_reduce(sums)
        loss, nll = (sums / agreed.weight).tolist()
        check_finite(loss, "the loss", step, learning_rate)
        self._update()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        check_finite(grad_norm, "the gradient's norm", step, learning_rate)
        return StepResult(loss, nll, grad_norm, agreed.tokens, agreed.stop)

    def _differentiate(self, batches: Sequence[ModelBatch], step: int, factor: float) -> Tensor:
        """Gradients of `factor` times the summed loss, over replicas; returns float64 sums `[2]` of loss and nll."""
        self.deepspeed.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
            part = batch.trimmed().to(self.device)
            result = self.deepspeed(part.inputs, torch.tensor([step, batch.index]), part.labels, part.loss_weight)
            self.deepspeed.backward(result.loss * factor)
            sums += torch.stack((result.loss.detach(), result.nll.detach())).double()
        return sums

    def _update(self) -> None:
        self.deepspeed.step()

    def close(self) -> None:
        """Leave the process group; the process can make another engine afterwards."""
        import deepspeed

        self.deepspeed.destroy()
        if dist.is_initialized():
            deepspeed.comm.destroy_process_group()


def preload() -> None:
    """Import everything slow, so that a standby process starts an attempt at once."""
    import_deepspeed()
    import safetensors.torch  # noqa: F401


def create_engine(
    config: RunConfig, vocabulary_size: int, pad_id: int, initial: Mapping[str, Tensor] | None = None
) -> Engine:
    """Join the process group and build this rank's engine, the model from the run's seed or from `initial` parameters.

    Expects RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. Padding is known by segment
    0, so `pad_id` decides nothing. Raises CapacityError when a GPU is asked for and not there.
    """
    device = choose_device(config)
    with quiet():
        join_process_group(device)
        context = join(_mesh(config), PROCESS_GROUP_TIMEOUT)
        shapes = parameter_shapes(config.model, vocabulary_size)
        if initial is not None and initial.keys() != shapes.keys():
            raise KeyError(f"parameters differ: {sorted(initial.keys() ^ shapes.keys())[:4]}")
        if context.pipeline.size == 1:
            kind, module, engine = Engine, *_whole_model(config, vocabulary_size, device, context, initial)
        else:
            # Its classes derive from DeepSpeed's, which must not be imported before the device is chosen.
            from model.pipeline import PipelineEngine, one_stage

            kind, module, engine = PipelineEngine, *one_stage(config, vocabulary_size, context, initial)
        result = kind(module, engine, device, context, shapes)
    optimizer = engine.optimizer.optimizer
    if isinstance(optimizer, MuonAdamW):
        optimizer.lay_out(muon_pieces(result), context.stage_group)
    return result


def _whole_model(
    config: RunConfig,
    vocabulary_size: int,
    device: torch.device,
    context: ParallelContext,
    initial: Mapping[str, Tensor] | None,
) -> tuple[Transformer, Any]:
    """What this rank has of all layers, and DeepSpeed's engine for it."""
    import deepspeed

    train, seed = config.train, config.run.seed
    layers = build_layers(config.model, seed, train.label_smoothing, train.z_loss, context.tensor)
    module = Transformer(layers, vocabulary_size, config.model, context.tensor)
    module.recomputes = train.activation_checkpointing
    round_weights(module, train)
    module.begin(seed, initial)
    module = module.to(device)
    optimizer = build_optimizer(module, config.optimizer)
    unit = ModelParallelUnit(context) if context.tensor.size > 1 else None
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config), mpu=unit)
    return module, engine


def _mesh(config: RunConfig) -> Mesh:
    """The mesh of this process group: as many replicas as its ranks make."""
    parallelism, ranks = config.parallelism, dist.get_world_size()
    pipeline, tensor = parallelism.pipeline, parallelism.tensor
    assert ranks % (pipeline * tensor) == 0, f"{ranks} ranks are no whole replicas of {pipeline} x {tensor}"
    return Mesh(data=ranks // (pipeline * tensor), pipeline=pipeline, tensor=tensor)
