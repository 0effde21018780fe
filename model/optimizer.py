"""The torch optimizer that DeepSpeed shards: Adam of section 5.3 of Vaswani et al. 2017, or AdamW with decay groups."""

from __future__ import annotations

import torch
from torch import nn

from configs.schema import OptimizerSection


def build_optimizer(module: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Adam, or with `weight_decay` AdamW that decays matrices and leaves biases and norms alone.

    The learning rate is set by the caller before each step.
    """
    shared = {"lr": 0.0, "betas": section.betas, "eps": section.eps, "fused": True}
    parameters = list(module.parameters())
    if not section.weight_decay:
        return torch.optim.Adam(parameters, **shared)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **shared)
