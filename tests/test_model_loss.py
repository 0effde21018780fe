"""Chunked label-smoothed cross-entropy against torch's, values and gradients; the schedule against its equation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.loss import chunked_cross_entropy


def reference(hidden, weight, labels, loss_weight, smoothing):
    logits = F.linear(hidden, weight).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten().long(), label_smoothing=smoothing, reduction="none")
    nll = F.cross_entropy(logits, labels.flatten().long(), reduction="none")
    return (losses * loss_weight.flatten()).sum(), (nll * loss_weight.flatten()).sum()


@settings(deadline=None, max_examples=25)
@given(
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    chunk=st.sampled_from([1, 3, 7, 1000]),
    scale=st.sampled_from([0.1, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_loss_and_gradients_equal_torch(smoothing, chunk, scale, seed):
    random = torch.Generator().manual_seed(seed)
    values = [torch.randn(3, 5, 8, generator=random), torch.randn(17, 8, generator=random) * scale]
    labels = torch.randint(0, 17, (3, 5), generator=random).int()
    loss_weight = torch.tensor([0.0, 1.0, 0.5])[torch.randint(0, 3, (3, 5), generator=random)]
    ours = [value.clone().requires_grad_() for value in values]
    theirs = [value.double().requires_grad_() for value in values]
    sums = chunked_cross_entropy(*ours, labels, loss_weight, smoothing, chunk)
    loss, nll = reference(*theirs, labels, loss_weight.double(), smoothing)
    tolerance = {"rtol": 1e-5, "atol": 1e-4 if scale > 1 else 1e-5}
    torch.testing.assert_close(sums.loss.double(), loss, **tolerance)
    torch.testing.assert_close(sums.nll.double(), nll, **tolerance)
    (sums.loss * 0.37).backward()
    (loss * 0.37).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, **tolerance)


def test_labels_of_positions_without_weight_may_be_anything():
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([[2, -100, 10**6]])
    sums = chunked_cross_entropy(hidden, weight, labels, torch.tensor([[1.0, 0.0, 0.0]]))
    sums.loss.backward()
    assert sums.loss.isfinite() and (hidden.grad[0, 1:] == 0).all() and (hidden.grad[0, 0] != 0).any()


def test_without_any_weight_the_loss_is_zero_and_differentiable():
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    sums = chunked_cross_entropy(hidden, weight, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3))
    sums.loss.backward()
    assert sums.loss == 0 and sums.nll == 0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    hidden, weight = torch.randn(1, 640, 4, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    with Watch():
        chunked_cross_entropy(
            hidden, weight, torch.zeros(1, 640, dtype=torch.int32), torch.ones(1, 640), 0.1, 64
        ).loss.backward()
    assert max(largest) == 64 * 512


def test_bf16_weights_get_bf16_gradients_near_the_float32_ones():
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 40, 16, generator=random), torch.randn(30, 16, generator=random)
    labels, ones = torch.randint(0, 30, (1, 40), generator=random), torch.ones(1, 40)
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    half = [hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    one = chunked_cross_entropy(*exact, labels, ones, 0.1, 7).loss
    other = chunked_cross_entropy(*half, labels, ones, 0.1, 7).loss
    one.backward()
    other.backward()
    assert other.dtype == torch.float32 and other.item() == pytest.approx(one.item(), rel=1e-2)
    for mine, theirs in zip(half, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.float() - theirs.grad).abs().max() < 0.05 * theirs.grad.abs().max()
