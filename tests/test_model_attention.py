"""Attention, positions and masks against a literal float64 transcription and torch's own multi-head attention."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import MultiHeadAttention, attention_weights, causal_segment_mask, segment_mask
from model.positions import sinusoidal_positions


def literal_attention(x, memory, allowed, parts, heads):
    """softmax(Q K^T / sqrt(d_k)) V per head, with loops, in float64 (paper equation 1 and section 3.2.2)."""
    project = {name: (weight.astype(np.float64), bias.astype(np.float64)) for name, (weight, bias) in parts.items()}
    query, key, value = (
        data @ project[name][0].T + project[name][1]
        for name, data in (("query", x), ("key", memory), ("value", memory))
    )
    width = query.shape[-1] // heads
    result = np.zeros_like(query)
    for batch in range(x.shape[0]):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(x.shape[1]):
                seen = [j for j in range(memory.shape[1]) if allowed[batch, i, j]]
                if not seen:
                    continue
                scores = np.array([query[batch, i, part] @ key[batch, j, part] / math.sqrt(width) for j in seen])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                result[batch, i, part] = sum(w * value[batch, j, part] for w, j in zip(weights, seen, strict=True))
    return result @ project["output"][0].T + project["output"][1]


def parts_of(attention):
    names = ("query", "key", "value", "output")
    layers = {name: getattr(attention, name) for name in names}
    return {name: (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for name, layer in layers.items()}


def make_attention(d_model, heads):
    torch.manual_seed(3)
    attention = MultiHeadAttention(d_model, heads)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


@settings(deadline=None, max_examples=15)
@given(
    heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 7),
    seed=st.integers(0, 10**6),
)
def test_attention_equals_its_transcription(heads, queries, keys, seed):
    random = torch.Generator().manual_seed(seed)
    attention = make_attention(8, heads)
    x, memory = torch.randn(2, queries, 8, generator=random), torch.randn(2, keys, 8, generator=random)
    allowed = torch.rand(2, queries, keys, generator=random) < 0.6
    found = attention(x, memory, allowed.unsqueeze(1)).detach().numpy()
    expected = literal_attention(
        x.double().numpy(), memory.double().numpy(), allowed.numpy(), parts_of(attention), heads
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_equals_torch_multihead_attention():
    attention = make_attention(16, 4)
    torch_s = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    parts = [attention.query, attention.key, attention.value]
    with torch.no_grad():
        torch_s.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        torch_s.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        torch_s.out_proj.weight.copy_(attention.output.weight)
        torch_s.out_proj.bias.copy_(attention.output.bias)
    x, memory = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    segments = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    expected, weights = torch_s(x, memory, memory, key_padding_mask=segments == 0, average_attn_weights=False)
    mask = segment_mask(torch.ones(3, 5, dtype=torch.long), segments)
    torch.testing.assert_close(attention(x, memory, mask), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_weights(attention, x, memory, mask), weights, atol=1e-5, rtol=0)


def test_a_query_that_may_look_nowhere_gets_the_output_bias_and_finite_gradients():
    attention = make_attention(8, 2)
    x, memory = torch.randn(1, 3, 8, requires_grad=True), torch.randn(1, 4, 8, requires_grad=True)
    allowed = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    allowed[:, :, 1] = False
    found = attention(x, memory, allowed)
    torch.testing.assert_close(found[0, 1], attention.output.bias)
    found.square().sum().backward()
    assert x.grad.isfinite().all() and memory.grad.isfinite().all()
    assert (x.grad[0, 1] == 0).all() and (x.grad[0, 0] != 0).any()
    assert (attention_weights(attention, x, memory, allowed)[0, :, 1] == 0).all()


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
def test_masks_follow_from_segments_and_positions(rows):
    width = max(sum(row) for row in rows) + 2
    segments, positions = np.zeros((len(rows), width), int), np.zeros((len(rows), width), int)
    for i, row in enumerate(rows):
        start = 0
        for number, length in enumerate(row, 1):
            segments[i, start : start + length], positions[i, start : start + length] = number, range(length)
            start += length
    causal = causal_segment_mask(torch.tensor(segments), torch.tensor(positions)).squeeze(1).numpy()
    both = segment_mask(torch.tensor(segments), torch.tensor(segments)).squeeze(1).numpy()
    for i in range(len(rows)):
        for q in range(width):
            for k in range(width):
                same = segments[i, q] == segments[i, k]
                assert both[i, q, k] == same
                if segments[i, q]:
                    assert causal[i, q, k] == (same and k <= q)
                else:
                    assert not causal[i, q, k] or segments[i, k] == 0
            assert causal[i, q, q]


def test_positions_equal_the_papers_formula():
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 100, 4095, 100_000, 7]])
    found = sinusoidal_positions(positions, 10)
    for index in np.ndindex(2, 5):
        pos = int(positions[index])
        for i in range(5):
            angle = pos / 10000 ** (2 * i / 10)
            assert found[index][2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert found[index][2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
