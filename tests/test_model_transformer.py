"""The encoder-decoder against torch.nn.Transformer, packing and causality by gradient, seeded dropout and weights."""

import pytest
import torch
from torch import nn

from configs.schema import ModelSection
from model.dropout import SeededDropout
from model.layers import DecoderLayer, SelfAttentionLayer
from model.positions import sinusoidal_positions
from model.transformer import build_layers, build_model, initial_parameter
from tests.test_engine import VOCABULARY, make_batch

SECTION = ModelSection(d_model=32, heads=4, d_ff=48, encoder_layers=2, decoder_layers=3, dropout=0.0)


def copy_attention(ours, theirs):
    parts = [ours.query, ours.key, ours.value]
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def copy_layer(ours, theirs):
    copy_attention(ours.attention, theirs.self_attn)
    norms = [ours.attention_output.norm, ours.feed_forward_output.norm]
    if isinstance(ours, DecoderLayer):
        copy_attention(ours.cross_attention, theirs.multihead_attn)
        norms.insert(1, ours.cross_attention_output.norm)
    for number, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.inner.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.outer.state_dict())


def randomised(section=SECTION, seed=5):
    """A model whose biases and norms are not at their trivial initial values."""
    model = build_model(section, VOCABULARY, seed)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model.eval()


def plain_inputs(lengths_source, lengths_target, seed=0):
    """One segment per row, padding at its end."""
    random = torch.Generator().manual_seed(seed)
    result = []
    for lengths in (lengths_source, lengths_target):
        width = max(lengths)
        segments = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        tokens = torch.randint(3, VOCABULARY, segments.shape, generator=random) * segments
        result += [tokens, torch.arange(width).expand_as(tokens) * segments, segments]
    return tuple(result)


def test_the_whole_model_equals_torch_transformer():
    model = randomised()
    reference = nn.Transformer(32, 4, 2, 3, 48, dropout=0.0, activation="relu", batch_first=True).eval()
    for ours, theirs in zip(model.layers(SelfAttentionLayer), reference.encoder.layers, strict=True):
        copy_layer(ours, theirs)
    for ours, theirs in zip(model.layers(DecoderLayer), reference.decoder.layers, strict=True):
        copy_layer(ours, theirs)
    # The paper has no norm after the last layer, torch has one.
    reference.encoder.norm = reference.decoder.norm = None
    inputs = plain_inputs([7, 4, 1], [5, 6, 2])
    weight = model.embedding.weight
    scale = 32**0.5
    source = nn.functional.embedding(inputs[0], weight) * scale + sinusoidal_positions(inputs[1], 32)
    target = nn.functional.embedding(inputs[3], weight) * scale + sinusoidal_positions(inputs[4], 32)
    size = inputs[3].shape[1]
    expected = reference(
        source,
        target,
        tgt_mask=torch.ones(size, size, dtype=torch.bool).triu(1),
        src_key_padding_mask=inputs[2] == 0,
        tgt_key_padding_mask=inputs[5] == 0,
        memory_key_padding_mask=inputs[2] == 0,
    )
    found = model.hidden(inputs)[0]
    kept = inputs[5] > 0
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(inputs), found @ weight.T)


def test_an_encoder_layer_equals_torch_s_with_gradients():
    layer = SelfAttentionLayer(SECTION, 0, "x")
    reference = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, activation="relu", batch_first=True)
    copy_layer(layer, reference)
    segments = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    found = layer((x, torch.arange(6).expand(2, 6), segments, torch.zeros(2)))[0][segments > 0]
    expected = reference(y, src_key_padding_mask=segments == 0)[segments > 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        layer.feed_forward.inner.weight.grad, reference.linear1.weight.grad, atol=1e-4, rtol=1e-4
    )


def influence(model, inputs, row, position):
    """Which embedded source and target positions `[row, sequence]` the output at one place depends on."""
    kept = {}

    def keep(name):
        def hook(_module, _inputs, output):
            output[0].retain_grad()
            kept[name] = output[0]

        return hook

    hooks = [getattr(model, name).register_forward_hook(keep(name)) for name in ("embedding", "bridge")]
    model.hidden(inputs)[0][row, position].square().sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return tuple(kept[name].grad.abs().sum(-1) > 0 for name in ("embedding", "bridge"))


def test_a_packed_pair_sees_its_own_source_and_its_own_past_only():
    model = randomised()
    batch = make_batch(0, 3)
    segments, targets = batch.inputs[2], batch.inputs[5]
    for row in range(segments.shape[0]):
        for position in range(targets.shape[1]):
            own = targets[row, position]
            if own == 0:
                continue
            source, target = influence(model, batch.inputs, row, position)
            expected_source, expected_target = torch.zeros_like(source), torch.zeros_like(target)
            expected_source[row] = segments[row] == own
            expected_target[row] = (targets[row] == own) & (torch.arange(targets.shape[1]) <= position)
            assert (source == expected_source).all() and (target == expected_target).all()


def test_a_packed_pair_scores_as_it_does_alone():
    model = randomised()
    batch = make_batch(0, 3)
    logits = model.logits(batch.inputs)
    for row in range(3):
        for number in (1, 2):
            part = [batch.inputs[side + 2][row] == number for side in (0, 3)]
            alone = tuple(
                torch.ones(1, int(part[i // 3].sum()), dtype=torch.int32) if i % 3 == 2 else t[row][part[i // 3]][None]
                for i, t in enumerate(batch.inputs)
            )
            torch.testing.assert_close(model.logits(alone)[0], logits[row][part[1]], atol=1e-5, rtol=0)


def test_rows_of_padding_and_pairs_without_source_give_no_nan():
    model = build_model(SECTION, VOCABULARY, 0, 0.1)
    source, target = (torch.zeros(2, width, dtype=torch.int32) for width in (4, 3))
    segments = target.clone()
    segments[0] = 1
    sums = model((source, source, source, target, target, segments), None, target, segments.float())
    sums.loss.backward()
    assert sums.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_initial_weights_depend_on_seed_and_name_alone():
    small = build_model(SECTION, VOCABULARY, 5)
    torch.manual_seed(77)
    deep = build_model(SECTION.model_copy(update={"encoder_layers": 4}), VOCABULARY, 5)
    other = build_model(SECTION, VOCABULARY, 6)
    own = dict(deep.named_parameters())
    for name, parameter in small.named_parameters():
        assert (parameter == own[name]).all()
        assert (parameter == initial_parameter(name, parameter.shape, 5, SECTION)).all()
    assert (small.embedding.weight != other.embedding.weight).any()
    assert (small.encoder_0.attention.query.weight != small.encoder_1.attention.query.weight).any()
    assert small.embedding.weight is small.bridge.weight is small.head.weight
    bound = (6 / (32 + 48)) ** 0.5
    weight = small.encoder_0.feed_forward.inner.weight
    assert 0.9 * bound < weight.abs().max() <= bound
    assert small.embedding.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_the_parameter_count_follows_from_the_sizes():
    model = build_model(SECTION, VOCABULARY, 0)
    attention, feed_forward, norm = 4 * (32 * 32 + 32), 2 * 32 * 48 + 32 + 48, 64
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert sum(p.numel() for p in model.parameters()) == VOCABULARY * 32 + 2 * encoder + 3 * decoder
    assert [spec.name for spec in build_layers(SECTION, 0)] == model.names


def test_dropout_is_a_function_of_seed_step_micro_batch_and_layer():
    x = torch.ones(64, 64)
    layer = SeededDropout(0.25, 3, "encoder_0/attention")
    first = layer(x, torch.tensor([7, 2]))
    torch.manual_seed(99)
    assert (layer(x, torch.tensor([7, 2])) == first).all()
    assert (layer.added(x, x, torch.tensor([7, 2])) == first + 1).all()
    assert first.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    others = [
        layer(x, torch.tensor([8, 2])),
        layer(x, torch.tensor([7, 3])),
        SeededDropout(0.25, 4, "encoder_0/attention")(x, torch.tensor([7, 2])),
        SeededDropout(0.25, 3, "encoder_1/attention")(x, torch.tensor([7, 2])),
    ]
    for other in others:
        agreement = ((other == 0) == (first == 0)).float().mean().item()
        assert agreement == pytest.approx(0.75**2 + 0.25**2, abs=0.04)
    assert (layer.eval()(x, torch.tensor([7, 2])) == x).all()


def test_dropout_stands_where_the_paper_has_it():
    model = build_model(SECTION.model_copy(update={"dropout": 0.5}), VOCABULARY, 0)
    names = {name: module.name for name, module in model.named_modules() if isinstance(module, SeededDropout)}
    assert len(names) == 2 + 2 * 2 + 3 * 3 and len(set(names.values())) == len(names)
    inputs = plain_inputs([4], [3])
    embedded = model.embedding((*inputs, torch.zeros(2, dtype=torch.int64)))[0]
    assert 0.3 < (embedded == 0).float().mean().item() < 0.7
