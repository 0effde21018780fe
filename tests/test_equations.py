"""The equations of Vaswani et al. 2017, and those beside them, written out in float64 NumPy."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import OptimizerSection
from model.feed_forward import FeedForward
from model.loss import chunked_cross_entropy
from model.optimizer import build_optimizer
from model.residual import SubLayer
from tests.test_model_variants import section

shapes = {"width": st.sampled_from([2, 4, 6]), "inner": st.integers(1, 9), "rows": st.integers(1, 5)}


def numbers(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


@settings(deadline=None, max_examples=20)
@given(**shapes, seed=st.integers(0, 99))
def test_equation_2_the_feed_forward_layer(width, inner, rows, seed):
    layer = FeedForward(width, inner).double()
    w1, b1 = (p.detach().numpy() for p in (layer.inner.weight, layer.inner.bias))
    w2, b2 = (p.detach().numpy() for p in (layer.outer.weight, layer.outer.bias))
    x = numbers(rows, width, seed=seed)
    wanted = np.maximum(0, x @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), wanted, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(width=shapes["width"], rows=shapes["rows"], seed=st.integers(0, 99))
def test_section_3_1_residual_then_layer_norm(width, rows, seed):
    """LayerNorm(x + Sublayer(x)); the norm after Ba, Kiros and Hinton 2016, equations 3 and 4."""
    layer = SubLayer(section(d_model=width, heads=1), 0, "x").double().eval()
    x, out = numbers(1, rows, width, seed=seed), numbers(1, rows, width, seed=seed + 100)
    with torch.no_grad():
        layer.norm.weight.copy_(torch.tensor(numbers(width, seed=7)))
        layer.norm.bias.copy_(torch.tensor(numbers(width, seed=8)))
    added = x + out
    mean = added.mean(-1, keepdims=True)
    variance = ((added - mean) ** 2).mean(-1, keepdims=True)
    wanted = (added - mean) / np.sqrt(variance + 1e-5) * numbers(width, seed=7) + numbers(width, seed=8)
    found = layer.leave(torch.tensor(x), torch.tensor(out), torch.zeros(2, dtype=torch.int64))
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(smoothing=st.sampled_from([0.0, 0.1, 0.5]), rows=st.integers(1, 7), seed=st.integers(0, 99))
def test_section_5_4_cross_entropy_with_smoothed_labels(smoothing, rows, seed):
    """-sum_k q(k) log p(k), q(k) = (1 - e) [k = y] + e / K (Szegedy et al. 2016, section 7)."""
    vocabulary, width = 5, 4
    hidden, matrix = numbers(rows, width, seed=seed), numbers(vocabulary, width, seed=seed + 1)
    labels = np.random.default_rng(seed).integers(0, vocabulary, rows)
    weights = np.random.default_rng(seed + 2).integers(0, 2, rows).astype(float)
    loss = nll = 0.0
    for row in range(rows):
        logits = matrix @ hidden[row]
        p = np.exp(logits) / np.exp(logits).sum()
        q = (1 - smoothing) * (np.arange(vocabulary) == labels[row]) + smoothing / vocabulary
        loss += weights[row] * -(q * np.log(p)).sum()
        nll += weights[row] * -math.log(p[labels[row]])
    found = chunked_cross_entropy(
        torch.tensor(hidden), torch.tensor(matrix), torch.tensor(labels), torch.tensor(weights), smoothing
    )
    np.testing.assert_allclose([found.loss.item(), found.nll.item()], [loss, nll], atol=1e-5)


def adam(theta, gradients, rates, beta1, beta2, epsilon, decay=0.0):
    """Algorithm 1 of Kingma and Ba 2015; with `decay` algorithm 2 of Loshchilov and Hutter 2019."""
    m = v = np.zeros_like(theta)
    for t, (g, alpha) in enumerate(zip(gradients, rates, strict=True), 1):
        theta = theta - alpha * decay * theta
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - alpha * m_hat / (np.sqrt(v_hat) + epsilon)
    return theta


def test_section_5_3_adam_and_decay_of_matrices_alone():
    rates, gradients = [0.1, 0.2, 0.05], {name: numbers(3, 4, 4, seed=n) for n, name in enumerate(("weight", "bias"))}
    for decay in (0.0, 0.3):
        module = torch.nn.Linear(4, 4).double()
        before = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
        optimizer = build_optimizer(module, OptimizerSection(betas=(0.9, 0.98), eps=1e-9, weight_decay=decay))
        for step, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            module.weight.grad = torch.tensor(gradients["weight"][step])
            module.bias.grad = torch.tensor(gradients["bias"][step, 0])
            optimizer.step()
        weight = adam(before["weight"], gradients["weight"], rates, 0.9, 0.98, 1e-9, decay)
        bias = adam(before["bias"], gradients["bias"][:, 0], rates, 0.9, 0.98, 1e-9)
        np.testing.assert_allclose(module.weight.detach().numpy(), weight, atol=1e-12)
        np.testing.assert_allclose(module.bias.detach().numpy(), bias, atol=1e-12)
