"""The torch optimizer that DeepSpeed shards: Adam of section 5.3 of Vaswani et al. 2017, AdamW, or Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerSection
from model.muon import MuonAdamW

EMBEDDINGS, HEAD = ("embedding", "bridge"), "head"


def build_optimizer(module: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Adam; AdamW with `weight_decay`; with name `muon` Muon for the matrices of hidden layers and AdamW for the rest.

    Decay is for matrices: embeddings (also where they are the output projection), learned positions, norms and biases
    have none. The learning rate is set by the caller before each step.
    """
    shared = {"lr": 0.0, "betas": section.betas, "eps": section.eps, "fused": True}
    if section.name == "muon":
        return MuonAdamW(_groups(module, section), **shared)
    if not section.weight_decay:
        return torch.optim.Adam(list(module.parameters()), **shared)
    return torch.optim.AdamW(_groups(module, section), **shared)


def _groups(module: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Parameter groups, none of them empty, each parameter in one."""
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        layer = name.split(".")[0]
        if parameter.ndim < 2 or layer in EMBEDDINGS:
            rest.append(parameter)
        elif section.name == "muon" and layer != HEAD:
            muon.append(parameter)
        else:
            decayed.append(parameter)
    decay = section.weight_decay
    groups = [
        {"params": muon, "weight_decay": decay, "muon": True, "momentum": section.momentum},
        {"params": decayed, "weight_decay": decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
