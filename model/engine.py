"""One rank's training engine over DeepSpeed: forward, backward and update of whole optimizer steps.

What is promised beyond DeepSpeed: the loss is a mean over the target tokens of the global batch, however its
micro-batches are spread over ranks; the stop flag is agreed by all ranks; a step that is not finite is an error.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import CapacityError, TelarError
from configs.schema import RunConfig
from model.batch import ModelBatch
from model.deepspeed_config import deepspeed_config
from model.fragments import muon_pieces
from model.mesh import Mesh, ModelParallelUnit, ParallelContext, join
from model.muon import MuonAdamW
from model.operators import load_or_switch_off
from model.optimizer import build_optimizer
from model.sliced import full_shape
from model.transformer import Transformer, build_model

PROCESS_GROUP_TIMEOUT = timedelta(seconds=120)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class TrainingError(TelarError):
    """Training cannot go on: the loss or the gradient is not finite, or there is nothing to learn from."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on all ranks.

    `loss` (label-smoothed) and `nll` in nats are means over the target tokens of the global batch, `grad_norm` is the
    L2 norm of the global gradient before clipping, `stop` says that some rank asked for a stop.
    """

    loss: float
    nll: float
    grad_norm: float
    target_tokens: int
    stop: bool


class Engine:
    """The model and its share of the optimizer state on this rank; all methods are called on all ranks together."""

    def __init__(self, module: Transformer, engine: Any, device: torch.device, context: ParallelContext) -> None:
        self.module, self.deepspeed, self.device, self.context = module, engine, device, context
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.parameter_count = sum(math.prod(full_shape(parameter)) for parameter in module.parameters())

    def train_step(
        self, batches: Sequence[ModelBatch], step: int, learning_rate: float, stop: bool = False
    ) -> StepResult:
        """Train on this replica's micro-batches of the global batch, equally many on each (fill with zero-weight).

        Tensor ranks of one replica are given the same. `step` counts from 1 and seeds dropout together with each
        micro-batch's index. Raises TrainingError, before anything is updated when the loss is not finite.
        """
        weight, tokens, stops = self._agree(batches, stop)
        if weight <= 0:
            raise TrainingError(f"step {step}: no target token in the global batch; look at the data that was prepared")
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
            part = batch.trimmed().to(self.device)
            result = self.deepspeed(part.inputs, torch.tensor([step, batch.index]), part.labels, part.loss_weight)
            # DeepSpeed averages gradients over replicas; the product turns that into the sum over the global batch.
            self.deepspeed.backward(result.loss * (self.context.data.size / weight))
            sums += torch.stack((result.loss.detach(), result.nll.detach())).double()
        # All ranks hear the same numbers, so that all go on or none does; tensor ranks of a replica count as one.
        sums *= self.context.counts
        dist.all_reduce(sums)
        loss, nll = (sums / weight).tolist()
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss}; {_advice(learning_rate)}")
        self.deepspeed.step()
        grad_norm = float(self.deepspeed.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise TrainingError(f"step {step}: the gradient's norm is {grad_norm}; {_advice(learning_rate)}")
        return StepResult(loss, nll, grad_norm, int(tokens), stops > 0)

    def _agree(self, batches: Sequence[ModelBatch], stop: bool) -> tuple[float, float, float]:
        """Global loss weight, target tokens and number of ranks that want to stop, by one all-reduce."""
        counted = batches if self.context.counts else ()
        weight = sum(float(batch.loss_weight.sum(dtype=torch.float64)) for batch in counted)
        tokens = sum(int((batch.loss_weight != 0).sum()) for batch in counted)
        count = len(batches)
        mine = torch.tensor([weight, tokens, float(stop), count, count**2], dtype=torch.float64, device=self.device)
        dist.all_reduce(mine)
        weight, tokens, stops, counts, squares = mine.tolist()
        assert squares * self.world_size == counts**2, "ranks were given different numbers of micro-batches"
        assert count > 0, "a step needs at least one micro-batch"
        return weight, tokens, stops

    def close(self) -> None:
        """Leave the process group; the process can make another engine afterwards."""
        import deepspeed

        self.deepspeed.destroy()
        if dist.is_initialized():
            deepspeed.comm.destroy_process_group()


def preload() -> None:
    """Import everything slow, so that a standby process starts an attempt at once."""
    _import_deepspeed()
    import safetensors.torch  # noqa: F401


def create_engine(
    config: RunConfig, vocabulary_size: int, pad_id: int, initial: Mapping[str, torch.Tensor] | None = None
) -> Engine:
    """Join the process group and build this rank's engine, the model from the run's seed or from `initial` parameters.

    Expects RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. Padding is known by segment
    0, so `pad_id` decides nothing. On CPU, DS_ACCELERATOR=cpu is set unless DeepSpeed was imported before.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    assert not missing, f"{missing} are not in the environment"
    on_cpu = config.cluster.device == "cpu" or not torch.cuda.is_available()
    if config.cluster.device == "cuda" and on_cpu:
        raise CapacityError("cluster.device: cuda, but this process sees no GPU; set cluster.device to cpu or auto")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(config.train.threads_per_rank)
    deepspeed = _import_deepspeed()
    found = deepspeed.accelerator.get_accelerator().device_name()
    assert found == device.type, f"DeepSpeed uses {found}: it was imported before DS_ACCELERATOR={device.type} was set"
    with _quiet():
        # The operator would map 64 MiB of /dev/shm per rank when it finds LOCAL_SIZE, for inference only.
        os.environ.pop("LOCAL_SIZE", None)
        used = load_or_switch_off()
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=PROCESS_GROUP_TIMEOUT,
        )
        _number_from_zero()
        context = join(_mesh(config), PROCESS_GROUP_TIMEOUT)
        train, seed = config.train, config.run.seed
        losses = (train.label_smoothing, train.z_loss)
        module = build_model(config.model, vocabulary_size, seed, *losses, tensor=context.tensor)
        if initial is not None:
            module.load(initial)
        module = module.to(device)
        optimizer = build_optimizer(module, config.optimizer)
        unit = ModelParallelUnit(context) if context.tensor.size > 1 else None
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config), mpu=unit)
    logging.info("engine on %s, shared-memory operator %s", device, "loaded" if used else "off: going without it")
    result = Engine(module, engine, device, context)
    if isinstance(optimizer, MuonAdamW):
        optimizer.lay_out(muon_pieces(result))
    return result


def _import_deepspeed() -> ModuleType:
    """DeepSpeed with its logger turned into an ordinary one: no handler of its own, warnings and worse only."""
    with _quiet():
        import deepspeed
        from deepspeed.utils import logger
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, in each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    return deepspeed


def _number_from_zero() -> None:
    """Make ZeRO-3 number modules and parameters as in a fresh process.

    It counts on through a process's life and then compares the numbers between ranks, so that a process which had an
    engine before could not train together with one that had none.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = 0


@contextlib.contextmanager
def _quiet() -> Any:
    """DeepSpeed prints while it starts: to the debug log with that, and its warnings about itself away."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for line in printed.getvalue().splitlines():
        logging.debug("deepspeed: %s", line)


def _mesh(config: RunConfig) -> Mesh:
    """The mesh of this process group: as many replicas as its ranks make."""
    tensor, ranks = config.parallelism.tensor, dist.get_world_size()
    assert ranks % tensor == 0, f"{ranks} ranks are no whole replicas of {tensor} tensor ranks"
    return Mesh(data=ranks // tensor, tensor=tensor)


def _advice(learning_rate: float) -> str:
    return (
        f"the learning rate was {learning_rate:.3g}: lower optimizer.learning_rate, raise optimizer.warmup_steps or "
        "set optimizer.gradient_clipping"
    )
