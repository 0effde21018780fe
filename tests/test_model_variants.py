"""The field's variants of each part: norms, activations, positions, shared key heads, architectures, kinds."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import AttentionSection, ModelSection
from model.attention import MultiHeadAttention
from model.feed_forward import FeedForward
from model.layers import DecoderLayer, SelfAttentionLayer
from model.loss import chunked_cross_entropy
from model.positions import rotate
from model.residual import make_norm
from model.transformer import build_model
from tests.test_end_to_end import TINY
from tests.test_engine import VOCABULARY
from tests.test_model_transformer import SECTION, copy_layer, plain_inputs


def section(**changes):
    return ModelSection(**{**SECTION.model_dump(exclude={"attention"}), **changes})


DECODER = {"architecture": "decoder", "decoder_layers": 2}
LLAMA = {
    **DECODER,
    "positions": "rotary",
    "norm": "rms",
    "norm_placement": "pre",
    "feed_forward": "swiglu",
    "bias": False,
    "key_value_heads": 2,
    "tie_embeddings": False,
    "scale_embeddings": False,
}
KINDS = [
    AttentionSection(),
    AttentionSection(kind="window", window_tokens=3, global_tokens=1),
    AttentionSection(kind="blocklog", block_tokens=2),
    AttentionSection(kind="linear"),
]


def randomised(model_section, vocabulary=VOCABULARY, spread=0.1):
    model = build_model(model_section, vocabulary, 5)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * spread)
    return model.eval()


def test_pre_norm_with_gelu_equals_torch_transformer():
    model = randomised(section(norm_placement="pre", feed_forward="gelu"))
    reference = nn.Transformer(
        32, 4, 2, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    for ours, theirs in zip(model.layers(SelfAttentionLayer), reference.encoder.layers, strict=True):
        copy_layer(ours, theirs)
    for ours, theirs in zip(model.layers(DecoderLayer), reference.decoder.layers, strict=True):
        copy_layer(ours, theirs)
    reference.encoder.norm.load_state_dict(model.encoder_end.norm.state_dict())
    reference.decoder.norm.load_state_dict(model.decoder_end.norm.state_dict())
    inputs = plain_inputs([6, 3], [5, 4])
    source, target = (
        model.embedding.embed(inputs[0], inputs[1], None),
        model.bridge.embed(inputs[3], inputs[4], None),
    )
    expected = reference(
        source,
        target,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(5),
        src_key_padding_mask=inputs[2] == 0,
        memory_key_padding_mask=inputs[2] == 0,
        tgt_is_causal=True,
    )
    kept = inputs[5] > 0
    torch.testing.assert_close(model.hidden(inputs)[0][kept], expected[kept], atol=1e-5, rtol=0)


def literal_llama(model, tokens):
    """Logits of the rotary, RMSNorm, SwiGLU decoder with shared key heads, in float64 NumPy, token by token."""
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    heads, shared, width = 4, 2, 8

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights[name]

    def turned(x):
        result = np.empty_like(x)
        for position in range(x.shape[0]):
            for i in range(width // 2):
                angle = position / 10000 ** (2 * i / width)
                a, b = x[position, :, i], x[position, :, i + width // 2]
                result[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                result[position, :, i + width // 2] = a * math.sin(angle) + b * math.cos(angle)
        return result

    x = weights["embedding.weight"][tokens]
    for layer in ("decoder_0", "decoder_1"):
        y = norm(x, f"{layer}.attention_output.norm.weight")
        query, key, value = (y @ weights[f"{layer}.attention.{part}.weight"].T for part in ("query", "key", "value"))
        query = turned(query.reshape(-1, heads, width))
        key, value = turned(key.reshape(-1, shared, width)), value.reshape(-1, shared, width)
        mixed = np.zeros_like(query)
        for t in range(len(tokens)):
            for head in range(heads):
                scores = key[: t + 1, head // (heads // shared)] @ query[t, head] / math.sqrt(width)
                probabilities = np.exp(scores - scores.max())
                mixed[t, head] = probabilities / probabilities.sum() @ value[: t + 1, head // (heads // shared)]
        x = x + mixed.reshape(len(tokens), -1) @ weights[f"{layer}.attention.output.weight"].T
        y = norm(x, f"{layer}.feed_forward_output.norm.weight")
        gate = y @ weights[f"{layer}.feed_forward.gate.weight"].T
        inner = y @ weights[f"{layer}.feed_forward.inner.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * inner) @ weights[f"{layer}.feed_forward.outer.weight"].T
    return norm(x, "decoder_end.norm.weight") @ weights["head.weight"].T


def target_inputs(rows, segments=None):
    tokens = torch.tensor(rows)
    segments = torch.ones_like(tokens) if segments is None else torch.tensor(segments)
    positions = torch.zeros_like(tokens)
    for column in range(1, tokens.shape[1]):
        same = segments[:, column] == segments[:, column - 1]
        positions[:, column] = torch.where(same, positions[:, column - 1] + 1, 0)
    nothing = tokens[:, :0]
    return nothing, nothing, nothing, tokens, positions, segments


def test_a_llama_equals_its_transcription():
    model = randomised(section(**LLAMA))
    tokens = [5, 9, 3, 3, 17, 8, 4]
    found = model.logits(target_inputs([tokens]))[0]
    np.testing.assert_allclose(found.detach().numpy(), literal_llama(model, tokens), atol=1e-4)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 1, 1, 8, generator=random, dtype=torch.float64) for _ in range(2))

    def product(m, n):
        return (rotate(x, torch.tensor([[m]]), 100.0) * rotate(y, torch.tensor([[n]]), 100.0)).sum().item()

    assert rotate(x, torch.tensor([[7]]), 100.0).norm().item() == pytest.approx(x.norm().item())
    assert product(9, 4) == pytest.approx(product(105, 100))
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_shared_key_heads_equal_repeated_ones():
    shared, full = MultiHeadAttention(16, 4, 2), MultiHeadAttention(16, 4)
    with torch.no_grad():
        for name in ("query", "output"):
            getattr(full, name).load_state_dict(getattr(shared, name).state_dict())
        for name in ("key", "value"):
            of_shared, of_full = getattr(shared, name), getattr(full, name)
            of_full.weight.copy_(of_shared.weight.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16))
            of_full.bias.copy_(of_shared.bias.view(2, 4).repeat_interleave(2, 0).flatten())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(shared(x, x, None), full(x, x, None))


def test_feed_forward_and_norms_equal_their_formulas():
    random = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 8, generator=random, dtype=torch.float64)
    for activation in ("gelu", "swiglu"):
        layer = FeedForward(8, 12, activation).double()
        inner = x @ layer.inner.weight.T + layer.inner.bias
        if activation == "gelu":
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        else:
            gate = x @ layer.gate.weight.T + layer.gate.bias
            inner = gate * torch.sigmoid(gate) * inner
        torch.testing.assert_close(layer(x), inner @ layer.outer.weight.T + layer.outer.bias)
    norm = make_norm(section(norm="rms", d_model=8, heads=2, norm_eps=1e-3)).double()
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("architecture", [{}, DECODER, LLAMA], ids=["encoder_decoder", "decoder", "llama"])
def test_a_packed_document_scores_as_it_does_alone(architecture, kind):
    model = randomised(section(**architecture, attention=kind))
    texts = [[5, 9, 3, 4, 8, 11, 6], [7, 3, 12, 4, 4]]
    packed = list(target_inputs([[*texts[0], *texts[1], 0]], [[1] * 7 + [2] * 5 + [0]]))
    if architecture == {}:
        packed[:3] = packed[3:]
    found = model.logits(tuple(packed))[0]
    start = 0
    for text in texts:
        alone = list(target_inputs([text]))
        if architecture == {}:
            alone[:3] = alone[3:]
        expected = model.logits(tuple(alone))[0]
        torch.testing.assert_close(found[start : start + len(text)], expected, atol=2e-5, rtol=0)
        start += len(text)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_decoder_learns_nothing_from_later_tokens(kind):
    model = randomised(section(**DECODER, attention=kind))
    tokens = [5, 9, 3, 4, 8, 11, 6, 7]
    whole = model.logits(target_inputs([tokens]))[0]
    for cut in range(1, 8):
        changed = model.logits(target_inputs([tokens[:cut] + [1] * (8 - cut)]))[0]
        torch.testing.assert_close(changed[:cut], whole[:cut], atol=1e-5, rtol=0)
        assert (changed[cut:] != whole[cut:]).any()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_encoder_classifies_each_packed_text(pooling):
    model = randomised(section(architecture="encoder", classes=3, pooling=pooling))
    texts = [[5, 9, 3, 4], [7, 3, 12, 4, 4, 9]]
    tokens = torch.tensor([[*texts[0], *texts[1], 0, 0]])
    segments = torch.tensor([[1] * 4 + [2] * 6 + [0] * 2])
    positions = torch.tensor([[*range(4), *range(6), 0, 1]])
    asked = torch.tensor([[1, 2]])
    inputs = (tokens, positions, segments, asked, torch.zeros_like(asked), asked)
    found = model.logits(inputs)[0]
    for number, text in enumerate(texts):
        one = torch.ones(1, 1, dtype=torch.int64)
        row = torch.tensor([text])
        alone = model.logits((row, torch.arange(len(text))[None], torch.ones_like(row), one, one, one))[0, 0]
        torch.testing.assert_close(found[number], alone, atol=1e-5, rtol=0)
    labels, weight = torch.tensor([[2, 0]]), torch.tensor([[1.0, 0.0]])
    sums = model(inputs, None, labels, weight)
    assert sums.nll.item() == pytest.approx(-found[0].log_softmax(-1)[2].item(), rel=1e-5)
    sums.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_attention_dropout_is_seeded_and_leaves_empty_rows_finite():
    model = randomised(section(attention_dropout=0.4)).train()
    inputs = plain_inputs([6, 3], [5, 4])
    empty_source = (*inputs[:2], torch.zeros_like(inputs[2]), *inputs[3:])
    first, again, other = (model.hidden(inputs, torch.tensor([1, n]))[0] for n in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    model.hidden(empty_source, torch.tensor([1, 0]))[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not (model.eval().hidden(inputs)[0] == first).all()


def test_learned_positions_tell_places_apart():
    model = randomised(section(positions="learned", max_positions=6, **DECODER))
    found = model.logits(target_inputs([[5, 5, 5]], [[1, 2, 2]]))[0]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert (found[1] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss_and_its_gradients_equal_autograd(smoothing):
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 6, generator=random).requires_grad_()
    weight = (torch.randn(11, 6, generator=random) * 2).requires_grad_()
    labels = torch.randint(0, 11, (9,), generator=random)
    loss_weight = torch.tensor([1.0, 0, 2, 1, 1, 0, 1, 1, 0.5])
    found = chunked_cross_entropy(hidden, weight, labels, loss_weight, smoothing, 4, z_loss=0.3)
    logits = hidden @ weight.T
    each = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    expected = (each + 0.3 * logits.logsumexp(-1).square()) @ loss_weight
    torch.testing.assert_close(found.loss, expected)
    for got, want in zip(
        torch.autograd.grad(found.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_normal_initialisation_shrinks_what_writes_onto_the_residual_stream():
    model = build_model(
        section(**DECODER, initialisation="normal", d_model=64, d_ff=256, scale_embeddings=False), 64, 0
    )
    assert model.decoder_0.feed_forward.inner.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.decoder_0.feed_forward.outer.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"heads": 3}, "model.heads"),
        ({"key_value_heads": 3}, "model.key_value_heads"),
        ({"heads": 32, "positions": "rotary"}, "rotary"),
        ({"attention": {"kind": "sparse"}}, "model.attention.kind"),
        ({"attention": {"kind": "window"}, "attention_dropout": 0.1}, "attention_dropout"),
        ({"positions": "learned", "max_positions": 4}, "max_positions"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(model, message, tmp_path):
    changed = {**TINY, "model": {**TINY["model"], **model}}
    with pytest.raises(ConfigError, match=message):
        parse_config(changed, "test")
