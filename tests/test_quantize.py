"""Packed matrices: rounding errors, the layout of int4 against a plain loop, products, sizes, whole models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster import commit
from cluster.commit import CheckpointError
from cluster.storage import Storage
from configs.schema import ModelSection
from model.checkpoint import CheckpointReader, file_bytes, load_parameters, write_snapshot
from model.fragments import WEIGHT, Fragment
from model.generation import greedy
from model.packed import KINDS, DynamicInt8Weight, pack
from model.quantize import (
    QuantizedLinear,
    dense_parameters,
    install,
    matrices,
    memory_bytes,
    model_fragments,
    packed_matrices,
    quantize,
    read_packed,
)
from model.transformer import build_model
from tests.test_engine import VOCABULARY
from tests.test_model_transformer import plain_inputs
from tests.test_model_variants import DECODER, LLAMA, randomised, section


def matrix(rows, columns, seed=0, spread=True):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    return weight * torch.logspace(-6, 3, rows).unsqueeze(1) if spread else weight


def unpacked_by_hand(packed):
    """What a reader of the docstring would write: one weight after the other."""
    out, columns = packed.shape
    result = torch.zeros(out, columns)
    for i in range(out):
        for j in range(columns):
            if packed.kind == "int4-group":
                byte = int(packed.values[i, j // 2])
                half = byte % 16 if j % 2 == 0 else byte // 16
                result[i, j] = (half - 8) * float(packed.scale[i, j // packed.group])
            else:
                result[i, j] = int(packed.values[i, j]) * float(packed.scale[i])
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [32, 70])
def test_every_weight_is_where_the_layout_says(kind, columns):
    packed = pack(matrix(5, columns), kind, group=32)
    torch.testing.assert_close(packed.dense(), unpacked_by_hand(packed), rtol=1e-6, atol=0)
    tokens = torch.tensor([[4, 0], [2, 2]], dtype=torch.int32)
    torch.testing.assert_close(packed.look_up(tokens), packed.dense()[tokens.long()], rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 6), columns=st.integers(1, 130), seed=st.integers(0, 10**6))
def test_int8_is_off_by_half_a_step_at_most(rows, columns, seed):
    weight = matrix(rows, columns, seed)
    packed = pack(weight, "int8-weight")
    step = weight.abs().amax(1, keepdim=True) / 127
    # bfloat16 scales are rounded up, by 2^-7 of themselves at most.
    assert ((packed.dense() - weight).abs() <= 0.5 * step * (1 + 2**-7) * (1 + 1e-5) + 1e-30).all()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 200), group=st.sampled_from([32, 64, 128]), seed=st.integers(0, 999)
)
def test_int4_is_no_worse_than_with_the_scale_of_the_largest_weight(rows, columns, group, seed):
    weight = matrix(rows, columns, seed)
    error = (pack(weight, "int4-group", group).dense().double() - weight.double()).square()
    for row in range(rows):
        for start in range(0, columns, group):
            part = weight[row, start : start + group].tolist()
            largest = max(part, key=abs)
            scale = float(torch.tensor(largest / -8).to(torch.bfloat16))
            of_scale = sum((min(7, max(-8, round(value / scale))) * scale - value) ** 2 for value in part)
            assert float(error[row, start : start + group].sum()) <= of_scale * (1 + 1e-5) + 1e-12 * largest**2
            # Half a step, and a whole one for weights beyond +7 steps; steps of an eighth of the largest weight.
            assert of_scale <= len(part) * (1.05 * largest / 8) ** 2


def test_int4_of_normal_weights_has_a_tenth_of_error():
    weight = matrix(64, 512, spread=False)
    for group, most in ((32, 0.085), (64, 0.095), (128, 0.11)):
        error = (pack(weight, "int4-group", group).dense() - weight).norm() / weight.norm()
        assert error < most


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_extremes_stay_finite(kind):
    weight = torch.zeros(3, 64)
    weight[1, 5] = -3e38
    weight[2, 7] = 1e-35
    dense = pack(weight, kind).dense()
    assert torch.isfinite(dense).all() and (dense[0] == 0).all()
    torch.testing.assert_close(dense[1], weight[1], rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["int8-weight", "int4-group"])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (0, 64), (1, 64)])
def test_a_product_is_that_of_the_unpacked_matrix(kind, shape):
    packed = pack(matrix(48, 64, spread=False), kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ packed.dense().double().T
    # int8: x is exact to 15 bits of its row's largest element; the sum of |W| bounds what that can do.
    bound = 1e-6 if kind == "int4-group" else 0.5 / 32258
    largest = x.abs().amax(-1, keepdim=True) if len(x) else x[..., :1]
    allowed = largest.double() * packed.dense().abs().sum(1).double() * bound * 1.1 + 1e-5
    found = packed.linear(x)
    assert found.shape == (*shape[:-1], 48) and ((found - expected).abs() <= allowed).all()


def test_a_dynamic_product_is_one_of_integers():
    packed = pack(matrix(48, 64, spread=False), "int8-dynamic")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 4, 7).unsqueeze(1)
    x[3] = 0
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(step > 0, (x / step.clamp(min=1e-30)).round(), 0)
    expected = (rounded.long() @ packed.values.long().T).float() * step * packed.scale.float()
    torch.testing.assert_close(packed.linear(x), expected, rtol=1e-5, atol=0)


def test_the_integer_product_of_this_machine_does_not_saturate():
    left, right = torch.full((2, 4096), 127, dtype=torch.int8), torch.full((8, 4096), -128, dtype=torch.int8)
    assert (torch._int_mm(left, right.t()) == -127 * 128 * 4096).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_product_in_chunks(kind, monkeypatch):
    packed, x = pack(matrix(48, 64, spread=False), kind), torch.randn(3, 64)
    whole = packed.linear(x)
    monkeypatch.setattr("model.packed.CHUNK_ELEMENTS", 300)
    torch.testing.assert_close(packed.linear(x), whole, rtol=1e-5, atol=1e-5)


SECTIONS = {
    "encoder-decoder": section(),
    "decoder": section(**DECODER),
    "untied llama": section(**LLAMA),
    "learned positions": section(**DECODER, positions="learned", max_positions=32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_a_quantized_model_computes_with_its_unpacked_weights(kind, name):
    model, dense = randomised(SECTIONS[name]), build_model(SECTIONS[name], VOCABULARY, 0).eval()
    before = dict(model.named_parameters())
    wanted = {each for each, p in before.items() if p.ndim == 2 and not each.endswith(".positions")}
    assert set(matrices(model)) == wanted
    quantize(model, kind, group=32)
    assert set(packed_matrices(model)) == wanted
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    dense.load(dense_parameters(model))
    inputs = plain_inputs([1, 1] if name != "encoder-decoder" else [7, 4], [6, 3])
    kept = inputs[5] > 0
    tolerance = 0.3 if kind == "int8-dynamic" else 2e-3
    torch.testing.assert_close(model.logits(inputs)[kept], dense.logits(inputs)[kept], atol=tolerance, rtol=tolerance)
    if kind != "int8-dynamic":
        sources = [[5, 9, 4], [7], [3, 3, 8, 20, 11]]
        assert greedy(model, sources, 1, 2, 6) == greedy(dense, sources, 1, 2, 6)


def test_tied_embeddings_are_one_matrix():
    model = randomised(section())
    quantize(model, "int8-weight")
    assert model.embedding.weight is model.head.weight and model.embedding.weight is model.bridge.weight
    assert sum(packed.values.numel() for packed in {id(p): p for p in packed_matrices(model).values()}.values()) == sum(
        p.numel() for n, p in randomised(section()).named_parameters() if p.ndim == 2
    )


@pytest.mark.parametrize(("kind", "ratio"), [("int8-weight", 3.9), ("int8-dynamic", 3.9), ("int4-group", 7.0)])
def test_sizes_where_matrices_dominate(kind, ratio):
    """d_model 512, d_ff 2048 (Vaswani et al.'s base, one layer each), vocabulary 4096."""
    model = build_model(ModelSection(encoder_layers=1, decoder_layers=1), 4096, 0)
    disk, memory = file_bytes(model_fragments(model)), memory_bytes(model)
    assert memory == 4 * sum(parameter.numel() for parameter in model.parameters())
    quantize(model, kind)
    assert disk / file_bytes(model_fragments(model)) >= ratio
    assert memory / memory_bytes(model) >= ratio


def written(storage, pieces):
    file = write_snapshot(storage, 4, 1, 0, pieces)
    commit.commit(storage, 4, 1, [file], 1, {})
    assert storage.size("step-00000004/attempt-001/rank-00000.safetensors") == file.bytes
    return CheckpointReader(storage, commit.read_commit(storage, 4))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_checkpoint_keeps_the_integers(kind, tmp_path):
    model, again = randomised(section()), build_model(section(), VOCABULARY, 0).eval()
    quantize(model, kind, group=32)
    with written(Storage(str(tmp_path)), model_fragments(model)) as reader:
        install(again, read_packed(reader))
        again.load(load_parameters(reader))
        with pytest.raises(CheckpointError, match="quantized"):
            reader.read("embedding.weight", WEIGHT, 0, 4)
    ours, theirs = packed_matrices(model), packed_matrices(again)
    for name, packed in ours.items():
        assert type(theirs[name]) is type(packed) and theirs[name].shape == packed.shape
        assert torch.equal(theirs[name].values, packed.values) and torch.equal(theirs[name].scale, packed.scale)
    inputs = plain_inputs([7, 4], [6, 3])
    assert torch.equal(model.logits(inputs), again.logits(inputs))


def test_a_state_in_pieces_is_refused(tmp_path):
    packed = pack(matrix(4, 64), "int8-weight")
    pieces = [
        Fragment("w", packed.kind, (4, 64), start, packed.values.flatten()[start : start + 128]) for start in (0, 128)
    ]
    pieces.append(Fragment("w", "scale", (4, 64), 0, packed.scale))
    with written(Storage(str(tmp_path)), pieces) as reader, pytest.raises(CheckpointError, match="2 pieces"):
        read_packed(reader)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected"):
        install(randomised(section()), {"embedding.weight": pack(matrix(3, 32), "int8-weight")})


def test_a_linear_layer_keeps_its_bias():
    linear = nn.Linear(64, 16)
    packed = QuantizedLinear(DynamicInt8Weight(*_parts(linear.weight)), linear.bias)
    x = torch.zeros(2, 64)
    torch.testing.assert_close(packed(x), linear.bias.expand(2, 16))
    assert (packed.in_features, packed.out_features) == (64, 16)


def _parts(weight):
    packed = pack(weight, "int8-dynamic")
    return packed.values, packed.scale, packed.shape
