"""Unstructured pruning: weights of linear layers become 0, by magnitude or by Wanda. Matrices keep their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.batch import ModelBatch
from model.transformer import Transformer

PATTERN_OF = 4  # 2:4: of four neighbours in a row two stay


def magnitude_mask(weight: Tensor, amount: float) -> Tensor:
    """Bool `[out, in]`, False on the share `amount` of the whole matrix that is smallest (Han et al. 2015)."""
    return _largest(weight.abs().flatten().unsqueeze(0), amount).view_as(weight)


def wanda_mask(weight: Tensor, input_norms: Tensor, amount: float) -> Tensor:
    """Bool `[out, in]`, False on the share `amount` of each row with the smallest |W_ij| * ||X_j||.

    Equation 1 of Sun et al. 2023, compared within each output; `input_norms [in]` are L2 norms over tokens.
    """
    return _largest(weight.abs() * input_norms, amount)


def pattern_mask(score: Tensor) -> Tensor:
    """2:4: bool `[out, in]`, True on the two highest of each four neighbours in a row; `in` is a multiple of 4."""
    grouped = score.unflatten(1, (-1, PATTERN_OF))
    kept = grouped.argsort(dim=-1, descending=True, stable=True)[..., : PATTERN_OF // 2]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)


def _largest(score: Tensor, amount: float) -> Tensor:
    removed = score.argsort(dim=1, stable=True)[:, : round(score.shape[1] * amount)]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, removed, False)


@torch.no_grad()
def sparsify(
    model: Transformer, method: str, amount: float, pattern: bool = False, batches: Sequence[ModelBatch] = ()
) -> None:
    """Set weights of all linear layers inside encoder and decoder layers to 0; embedding and head stay.

    `method` is "magnitude" or "wanda". Wanda goes through the layers in their order, with the norms of what enters a
    layer measured on `batches` after those before it were pruned (section 3 of the paper). `pattern`: 2:4, whatever
    `amount` says.
    """
    for name in model.names[:-1]:
        layer = getattr(model, name)
        linears = {f"{name}.{each}": module for each, module in layer.named_modules() if isinstance(module, nn.Linear)}
        norms = input_norms(model, linears, batches) if method == "wanda" and linears else {}
        for each, linear in linears.items():
            norm = norms.get(each)
            if pattern:
                mask = pattern_mask(linear.weight.abs() * (1.0 if norm is None else norm))
            elif norm is None:
                mask = magnitude_mask(linear.weight, amount)
            else:
                mask = wanda_mask(linear.weight, norm, amount)
            linear.weight *= mask


@torch.no_grad()
def input_norms(model: Transformer, linears: dict[str, nn.Linear], batches: Sequence[ModelBatch]) -> dict[str, Tensor]:
    """L2 norm over all real tokens of each input of these layers, float32 `[in]` by name; padding does not count."""
    sums = {name: torch.zeros(linear.in_features, dtype=torch.float64) for name, linear in linears.items()}
    real: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[..., None]:
        side = "source" if _reads_source(name) else "target"

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            sums[name] += inputs[0][real[side]].double().square().sum(0)

        return add

    hooks = [linear.register_forward_hook(adding(name)) for name, linear in linears.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            real.update(source=batch.inputs[2] > 0, target=batch.inputs[5] > 0)
            model.hidden(batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {name: total.sqrt().float() for name, total in sums.items()}


def _reads_source(name: str) -> bool:
    """Whether a layer's inputs are the source's tokens; keys and values across come from the encoder."""
    return name.startswith("encoder") or name.endswith(("cross_attention.key", "cross_attention.value"))
