"""Layers of tensor ranks: the plain ones on one rank, to the bit; on several, one model in loss and gradients."""

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from configs.schema import ModelSection
from model.dropout import SeededDropout
from model.mesh import Axis, Mesh, join
from model.parallel_linear import ColumnParallelLinear, RowParallelLinear, embedded
from model.sliced import Slice, full_shape, slice_of
from model.transformer import build_layers, build_model, initial_parameter
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import VOCABULARY, make_batch

SMALL = {"d_model": 16, "heads": 4, "d_ff": 24, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_on_one_rank_they_are_torch_s_linear(kind, bias):
    torch.manual_seed(0)
    plain = nn.Linear(6, 10, bias)
    torch.manual_seed(0)
    ours = kind(6, 10, bias)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert all(slice_of(parameter) is None for parameter in ours.parameters())
    x = torch.randn(3, 5, 6)
    results = []
    for layer in (plain, ours):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        results.append([y.detach(), own.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all((one == other).all() for one, other in zip(*results, strict=True))
    tokens, weight = torch.randint(10, (3, 4)), torch.randn(10, 6)
    assert (embedded(tokens, weight, None) == F.embedding(tokens, weight)).all()


@settings(deadline=None, max_examples=50)
@given(full=st.integers(1, 40), size=st.integers(1, 8), dimension=st.sampled_from([0, 1]))
def test_slices_cover_a_dimension_once_and_evenly(full, size, dimension):
    shape = (full, 3) if dimension == 0 else (3, full)
    whole = torch.arange(3 * full).view(shape)
    parts = [Slice(dimension, full, rank, size) for rank in range(size)]
    assert (torch.cat([part.of(whole) for part in parts], dimension) == whole).all()
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_starts_from_its_part_of_the_same_tensors(size):
    section = ModelSection(**SMALL, tie_embeddings=False)
    whole = dict(build_model(section, VOCABULARY, 3).named_parameters())
    # No process group: nothing but the axis decides what a rank holds.
    ranks = [dict(build_model(section, VOCABULARY, 3, tensor=Axis(size, r)).named_parameters()) for r in range(size)]
    for name, expected in whole.items():
        assert (initial_parameter(name, expected.shape, 3, section) == expected).all()
        parts = [rank[name] for rank in ranks]
        assert all(full_shape(part) == tuple(expected.shape) for part in parts), name
        record = slice_of(parts[0])
        if record is None:
            assert all((part == expected).all() for part in parts)
        else:
            assert (torch.cat(list(parts), record.dimension) == expected).all()
            assert all(part.tensor_model_parallel for part in parts)
    shared = {name for name in whole if slice_of(ranks[0][name]) is not None}
    # Norms and the biases behind a sum over ranks are everybody's; all the rest is shared.
    assert whole.keys() - shared == {
        name for name in whole if "norm" in name or name.endswith(("output.bias", "outer.bias"))
    }
    held = sum(parameter.numel() for parameter in ranks[0].values())
    assert held < 1.15 * sum(parameter.numel() for parameter in whole.values()) / size


def test_ranks_drop_the_attention_weights_that_one_rank_drops():
    key, like = torch.tensor([4, 2]), torch.zeros(3, 8, 5, 6)
    whole = SeededDropout(0.3, 1, "weights").mask(like, key)
    parts = [SeededDropout(0.3, 1, "weights", Axis(4, rank)).mask(like[:, :2], key) for rank in range(4)]
    assert (torch.cat(parts, 1) == whole).all() and len(whole.unique()) == 2
    # What all hold alike is dropped alike: the mask does not know the rank.
    outputs = [build_layers(ModelSection(dropout=0.1), 0, tensor=Axis(2, rank))[1].build(None) for rank in range(2)]
    masks = [layer.attention_output.dropout.mask(torch.zeros(2, 3, 512), key) for layer in outputs]
    assert (masks[0] == masks[1]).all()


def computed(section, z_loss, axis=None):
    """Loss, nll, logits and gradients (whole, by name) of one micro-batch."""
    model = build_model(section, VOCABULARY, 1, 0.1, z_loss, **({} if axis is None else {"tensor": axis}))
    batch = make_batch(0, 1)
    sums = model(batch.inputs, torch.zeros(2, dtype=torch.int64), batch.labels, batch.loss_weight)
    sums.loss.backward()
    gradients = {name: (p.grad.numpy(), slice_of(p)) for name, p in model.named_parameters()}
    return sums.loss.item(), sums.nll.item(), model.logits(batch.inputs).detach().numpy(), gradients


def computed_on_a_rank(section, z_loss):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        context = join(Mesh(tensor=dist.get_world_size()), timedelta(seconds=60))
        return computed(section, z_loss, context.tensor)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "more",
    [
        {"attention": {"kind": "window", "window_tokens": 3}},
        {"architecture": "decoder", "attention": {"kind": "blocklog", "block_tokens": 2}, "positions": "rotary"},
        {"attention": {"kind": "linear"}, "key_value_heads": 2, "feed_forward": "gelu", "tie_embeddings": False},
    ],
    ids=["window", "blocklog", "linear"],
)
def test_two_ranks_compute_what_one_does(gloo_pool, more):  # noqa: F811
    section = ModelSection(**SMALL, **more)
    loss, nll, logits, gradients = computed(section, 1e-2)
    ranks = gloo_pool.run(2, computed_on_a_rank, section, 1e-2)
    for found in ranks:
        assert found[0] == pytest.approx(loss, abs=1e-4) and found[1] == pytest.approx(nll, abs=1e-4)
        assert found[0] == ranks[0][0]
        np.testing.assert_allclose(found[2], logits, atol=1e-5)
    for name, (expected, _) in gradients.items():
        parts, record = [rank[3][name][0] for rank in ranks], ranks[0][3][name][1]
        if record is None:
            assert (parts[0] == parts[1]).all(), name
        whole = parts[0] if record is None else np.concatenate(parts, record.dimension)
        np.testing.assert_allclose(whole, expected, atol=1e-4, err_msg=name)
