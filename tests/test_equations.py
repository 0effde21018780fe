"""The equations of Vaswani et al. 2017, and those beside them, written out in float64 NumPy."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import OptimizerSection
from model.attention_kinds import AttentionKind, dense_attention
from model.feed_forward import FeedForward
from model.loss import chunked_cross_entropy
from model.optimizer import build_optimizer
from model.residual import SubLayer, make_norm
from tests.test_engine import VOCABULARY
from tests.test_model_transformer import plain_inputs, randomised
from tests.test_model_variants import section

shapes = {"width": st.sampled_from([2, 4, 6]), "inner": st.integers(1, 9), "rows": st.integers(1, 5)}


def numbers(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def attention(q, k, v):
    """Equation 1: softmax(Q K^T / sqrt(d_k)) V; `q [n, d_k]`, `k [m, d_k]`, `v [m, d_v]`."""
    scores = np.exp(q @ k.T / math.sqrt(q.shape[1]))
    return scores / scores.sum(-1, keepdims=True) @ v


@settings(deadline=None, max_examples=20)
@given(heads=st.integers(1, 3), width=st.integers(1, 6), queries=st.integers(1, 6), keys=st.integers(1, 7))
def test_equation_1_scaled_dot_product_attention(heads, width, queries, keys):
    q, k, v = (numbers(1, heads, n, width, seed=i) for i, n in enumerate((queries, keys, keys)))
    found = dense_attention(AttentionKind(), torch.tensor(q), torch.tensor(k), torch.tensor(v), None)
    for head in range(heads):
        np.testing.assert_allclose(found[0, head].numpy(), attention(q[0, head], k[0, head], v[0, head]), atol=1e-12)


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
@given(**shapes, seed=st.integers(0, 99))
def test_gelu_and_swiglu_in_the_place_of_relu(width, inner, rows, seed):
    """x Phi(x) (Hendrycks and Gimpel 2016); Swish(x W) * (x V) (Shazeer 2020, equation 6), with biases."""
    x = numbers(rows, width, seed=seed)
    for activation in ("gelu", "swiglu"):
        layer = FeedForward(width, inner, activation).double()
        w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
        h = x @ w["inner.weight"].T + w["inner.bias"]
        if activation == "gelu":
            h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        else:
            gate = x @ w["gate.weight"].T + w["gate.bias"]
            h = gate / (1 + np.exp(-gate)) * h
        wanted = h @ w["outer.weight"].T + w["outer.bias"]
        np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), wanted, atol=1e-12)


def test_rms_norm():
    """x_i / RMS(x) * g_i, RMS(x) = sqrt(mean of x_i^2) (Zhang and Sennrich 2019, equation 4), with epsilon inside."""
    norm, x, gain = (
        make_norm(section(norm="rms", d_model=6, heads=1)).double(),
        numbers(5, 6, seed=0),
        numbers(6, seed=1),
    )
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gain))
    wanted = [
        [v / math.sqrt(sum(u * u for u in row) / 6 + 1e-5) * g for v, g in zip(row, gain, strict=True)] for row in x
    ]
    np.testing.assert_allclose(norm(torch.tensor(x)).detach().numpy(), wanted, atol=1e-12)


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


def literal_transformer(w, source, target, heads, encoders, decoders):
    """Logits `[target, vocabulary]` of one sentence pair, by the equations of section 3 in their order."""
    d_model = w["embedding.weight"].shape[1]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embedded(tokens):
        """Sections 3.4 and 3.5: rows of the matrix times sqrt(d_model), plus PE(pos, 2i), PE(pos, 2i + 1)."""
        x = w["embedding.weight"][tokens] * math.sqrt(d_model)
        for pos in range(len(tokens)):
            for i in range(d_model // 2):
                angle = pos / 10000 ** (2 * i / d_model)
                x[pos, 2 * i] += math.sin(angle)
                x[pos, 2 * i + 1] += math.cos(angle)
        return x

    def multi_head(x, memory, name, causal):
        """Section 3.2.2: Concat(head_1, ..., head_h) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)."""
        q, k, v = (linear(a, f"{name}.{part}") for a, part in ((x, "query"), (memory, "key"), (memory, "value")))
        concatenated = np.zeros_like(q)
        for head in np.split(np.arange(d_model), heads):
            for t in range(len(x)):
                seen = slice(t + 1) if causal else slice(None)
                concatenated[t, head] = attention(q[t : t + 1, head], k[seen, head], v[seen, head])[0]
        return linear(concatenated, f"{name}.output")

    def normalised(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.norm.weight"] + w[f"{name}.norm.bias"]

    def feed_forward(x, name):
        return linear(np.maximum(0, linear(x, f"{name}.inner")), f"{name}.outer")

    x = embedded(source)
    for name in (f"encoder_{n}" for n in range(encoders)):
        x = normalised(x + multi_head(x, x, f"{name}.attention", False), f"{name}.attention_output")
        x = normalised(x + feed_forward(x, f"{name}.feed_forward"), f"{name}.feed_forward_output")
    memory, x = x, embedded(target)
    for name in (f"decoder_{n}" for n in range(decoders)):
        x = normalised(x + multi_head(x, x, f"{name}.attention", True), f"{name}.attention_output")
        x = normalised(x + multi_head(x, memory, f"{name}.cross_attention", False), f"{name}.cross_attention_output")
        x = normalised(x + feed_forward(x, f"{name}.feed_forward"), f"{name}.feed_forward_output")
    return x @ w["embedding.weight"].T


@settings(deadline=None, max_examples=8)
@given(
    heads=st.sampled_from([1, 2, 8]),
    encoders=st.integers(1, 2),
    decoders=st.integers(1, 2),
    lengths=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 6)), min_size=1, max_size=3),
)
def test_section_3_the_whole_model(heads, encoders, decoders, lengths):
    model = randomised(section(d_model=16, heads=heads, d_ff=24, encoder_layers=encoders, decoder_layers=decoders))
    model = model.double()
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    inputs = plain_inputs(*zip(*lengths, strict=True))
    # `logits` ends in float32; hidden states are compared before that.
    found = (model.hidden(inputs)[0] @ model.head.weight.T).detach().numpy()
    assert found.shape[-1] == VOCABULARY
    for row, (n, m) in enumerate(lengths):
        source, target = inputs[0][row, :n].numpy(), inputs[3][row, :m].numpy()
        wanted = literal_transformer(w, source, target, heads, encoders, decoders)
        np.testing.assert_allclose(found[row, :m], wanted, atol=1e-9)


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
