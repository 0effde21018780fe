"""Cross-entropy with label smoothing (Vaswani et al. 2017, section 5.4), summed, in chunks over tokens.

The logits of all tokens never exist at once: each chunk's logits give its part of the loss and, as the gradient of a
sum over tokens needs nothing from other chunks, its part of the gradients too. So the backward pass only scales them.
Ranks that share the vocabulary exchange a few numbers per token: the maximum and sums of its logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.mesh import ALONE, Axis
from model.parallel_linear import copied
from model.sliced import Slice

CHUNK_TOKENS = 512


class LossSums(NamedTuple):
    """Scalars in float32, weighted sums over tokens: `loss` with label smoothing (differentiable), `nll` without."""

    loss: Tensor
    nll: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    label_smoothing: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
    z_loss: float = 0.0,
    rows: Slice | None = None,
    tensor: Axis = ALONE,
) -> LossSums:
    """Sums of weighted losses of `softmax(hidden @ weight.T)`.

    `hidden [..., d_model]`, `weight [vocabulary, d_model]`, `labels` int `[...]`, `loss_weight` float `[...]`. For
    one token: (1 - e) * -log p(label) + e * mean over the vocabulary of -log p, as
    `torch.nn.functional.cross_entropy(label_smoothing=e)` has it, plus `z_loss` * (log of the softmax's normaliser)^2
    (Chowdhery et al. 2022, section 5), which is no part of nll. Positions of weight 0 are skipped: their labels may
    be anything, and no logits are computed for them. Where ranks of `tensor` share the vocabulary, `weight` holds the
    `rows` of this one; the sums are the same on all.
    """
    kept = loss_weight.flatten().nonzero().squeeze(-1)
    return LossSums(
        *_ChunkedCrossEntropy.apply(
            copied(hidden.flatten(0, -2)[kept], tensor),
            weight,
            labels.flatten()[kept].long(),
            loss_weight.flatten()[kept].float(),
            label_smoothing,
            z_loss,
            chunk_tokens,
            rows,
            tensor,
        )
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weight: Tensor,
        smoothing: float,
        z_loss: float,
        chunk_tokens: int,
        rows: Slice | None,
        tensor: Axis,
    ):
        vocabulary = weight.shape[0] if rows is None else rows.full
        loss = torch.zeros((), device=hidden.device)
        nll_sum = torch.zeros((), device=hidden.device)
        differentiate = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_gradient = torch.empty_like(hidden) if differentiate else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if differentiate else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = (hidden[part] @ weight.T).float()
            maxima = _over_ranks(logits.amax(-1, keepdim=True), tensor, dist.ReduceOp.MAX)
            own_labels, held = _own(labels[part].unsqueeze(-1), rows)
            of_label = logits.gather(-1, own_labels)
            logit_sum = logits.sum(-1) if smoothing else None
            # From here on the buffer holds exponentials, then probabilities, then the gradient.
            total = logits.sub_(maxima).exp_().sum(-1, keepdim=True)
            if rows is not None:
                shared = [total, of_label * held, *([logit_sum.unsqueeze(-1)] if smoothing else [])]
                total, of_label, *rest = _over_ranks(torch.stack(shared), tensor, dist.ReduceOp.SUM)
                logit_sum = rest[0].squeeze(-1) if smoothing else None
            log_total = maxima + total.log()
            nll = (log_total - of_label).squeeze(-1)
            nll_sum += nll @ loss_weight[part]
            smoothed = nll
            if smoothing:
                uniform = log_total.squeeze(-1) - logit_sum / vocabulary
                smoothed = (1.0 - smoothing) * nll + smoothing * uniform
            if z_loss:
                smoothed = smoothed + z_loss * log_total.squeeze(-1).square()
            loss += smoothed @ loss_weight[part]
            if not differentiate:
                continue
            scale = loss_weight[part].unsqueeze(-1)
            # With z-loss the gradient of the normaliser, which is the probabilities, counts 2 z log Z more.
            times = 1.0 + 2.0 * z_loss * log_total if z_loss else 1.0
            gradient = logits.mul_(scale * times / total)
            if smoothing:
                gradient.sub_(scale * (smoothing / vocabulary))
            at_label = -(1.0 - smoothing) * scale
            gradient.scatter_add_(-1, own_labels, at_label if held is None else at_label * held)
            gradient = gradient.to(hidden.dtype)
            hidden_gradient[part] = gradient @ weight
            if hidden.dtype == torch.float32:
                weight_gradient.addmm_(gradient.T, hidden[part])
            else:
                weight_gradient += gradient.T @ hidden[part]
        ctx.gradients = (hidden_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(nll_sum)
        return loss, nll_sum

    @staticmethod
    def backward(ctx, loss_gradient: Tensor, _nll_gradient: Tensor):  # noqa: ANN001
        hidden_gradient, weight_gradient = ctx.gradients
        ctx.gradients = None
        scaled_weight = weight_gradient.mul_(loss_gradient).to(ctx.dtype)
        return hidden_gradient * loss_gradient.to(hidden_gradient.dtype), scaled_weight, *[None] * 7


def _own(labels: Tensor, rows: Slice | None) -> tuple[Tensor, Tensor | None]:
    """Rows of this rank's weight for the labels, and which of them are its own (None: all); others get row 0."""
    if rows is None:
        return labels, None
    held = (labels >= rows.start) & (labels < rows.stop)
    return (labels - rows.start).masked_fill(~held, 0), held


def _over_ranks(x: Tensor, tensor: Axis, operation: dist.ReduceOp) -> Tensor:
    if tensor.size > 1:
        dist.all_reduce(x, operation, group=tensor.group)
    return x
