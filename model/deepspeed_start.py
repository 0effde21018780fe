"""Importing DeepSpeed, starting its communication, and keeping it quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch

from configs.errors import CapacityError
from configs.schema import RunConfig
from model.operators import load_or_switch_off

# Longer than any rank may wait for data or storage while its peers stand in a collective. A peer that
# is gone is noticed by its closed connection, one that hangs from outside (jobs/progress.py).
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def import_deepspeed() -> ModuleType:
    """DeepSpeed with its logger turned into an ordinary one: no handler of its own, warnings and worse only."""
    with quiet():
        import deepspeed
        from deepspeed.utils import logger
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, in each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    return deepspeed


def choose_device(config: RunConfig) -> torch.device:
    """Where this process trains; also set as torch's device, with the number of CPU threads.

    On CPU, DS_ACCELERATOR=cpu is set unless DeepSpeed was imported before. Raises CapacityError when the configuration
    wants a GPU and there is none.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    assert not missing, f"{missing} are not in the environment"
    on_cpu = config.cluster.device == "cpu" or not torch.cuda.is_available()
    if config.cluster.device == "cuda" and on_cpu:
        raise CapacityError("cluster.device: cuda, but this process sees no GPU; set cluster.device to cpu or auto")
    torch.set_num_threads(config.train.threads_per_rank)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join_process_group(device: torch.device) -> None:
    """Start DeepSpeed's communication between all ranks of the environment's WORLD_SIZE."""
    deepspeed = import_deepspeed()
    found = deepspeed.accelerator.get_accelerator().device_name()
    assert found == device.type, f"DeepSpeed uses {found}: it was imported before DS_ACCELERATOR={device.type} was set"
    # The operator would map 64 MiB of /dev/shm per rank when it finds LOCAL_SIZE, for inference only.
    os.environ.pop("LOCAL_SIZE", None)
    used = load_or_switch_off()
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=PROCESS_GROUP_TIMEOUT,
    )
    _number_from_zero()
    logging.info("engine on %s, shared-memory operator %s", device, "loaded" if used else "off: going without it")


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
def quiet() -> Any:
    """DeepSpeed prints while it starts: to the debug log with that, and its warnings about itself away."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for line in printed.getvalue().splitlines():
        logging.debug("deepspeed: %s", line)
