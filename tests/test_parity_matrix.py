"""Every way of sharing the work against a plain loop in one process: losses, gradient norms and final parameters.

The loop knows no DeepSpeed and no ranks: the model's classes, torch.optim.Adam, and clipping written out here. It sees
the whole global batch of 4 micro-batches, so that two replicas accumulate over 2.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from model.layers import SelfAttentionLayer
from model.transformer import build_model
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_engine import RATE, STEPS, VOCABULARY, make_batch, make_config, train_with_engine

MICRO_BATCHES = 4
MODELS = {
    "pairs": {},
    "decoder": {"architecture": "decoder", "decoder_layers": 4, "positions": "learned", "max_positions": 128},
    "llama": {
        "architecture": "decoder",
        "decoder_layers": 3,
        "positions": "rotary",
        "key_value_heads": 2,
        "feed_forward": "swiglu",
        "norm": "rms",
        "norm_placement": "pre",
        "bias": False,
        "tie_embeddings": False,
    },
    "classifier": {"architecture": "encoder", "encoder_layers": 3, "classes": VOCABULARY, "norm_placement": "pre"},
    "dropped weights": {"attention_dropout": 0.2, "norm_placement": "pre", "encoder_layers": 3},
}


class Shape(NamedTuple):
    """Sizes of the axes and the ZeRO stage."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    zero: int = 1

    @property
    def ranks(self):
        return self.data * self.pipeline * self.tensor

    def __str__(self):
        axes = zip(("DP", "PP", "TP"), self[:3], strict=True)
        return "x".join([f"{name}{size}" for name, size in axes if size > 1] + [f"Z{self.zero}"])


DP2, PP2, TP2 = Shape(data=2), Shape(pipeline=2), Shape(tensor=2)
ALL_AXES = Shape(2, 2, 2)
SHAPES = [
    *(Shape(data=2, zero=stage) for stage in (1, 2, 3)),
    Shape(data=3),
    TP2,
    *(Shape(data=2, tensor=2, zero=stage) for stage in (1, 2, 3)),
    PP2,
    Shape(pipeline=4),
    Shape(data=2, pipeline=2),
    Shape(pipeline=2, tensor=2),
    ALL_AXES,
]
# What the quick suite keeps.
QUICK = {("pairs", PP2), ("decoder", Shape(pipeline=2, tensor=2))}


def cells():
    for model in ("pairs", "decoder"):
        for shape in SHAPES:
            marks = () if (model, shape) in QUICK else pytest.mark.slow
            yield pytest.param(model, shape, 0.0, marks=marks, id=f"{model}-{shape}")
    for shape in (DP2, PP2, TP2, ALL_AXES):
        yield pytest.param("pairs", shape, 0.1, marks=pytest.mark.slow, id=f"dropout-{shape}")
    others = [
        ("llama", Shape(tensor=2, zero=3)),
        ("llama", Shape(pipeline=2, tensor=2)),
        ("llama", Shape(pipeline=3)),
        ("pairs", Shape(tensor=4, zero=3)),
        ("classifier", Shape(data=2, pipeline=2)),
        ("dropped weights", TP2),
        ("dropped weights", Shape(pipeline=3, tensor=2)),
    ]
    for model, shape in others:
        yield pytest.param(model, shape, 0.1, marks=pytest.mark.slow, id=f"{model}-{shape}")


def config_of(model, shape, dropout, **more):
    return make_config(
        model=MODELS[model],
        pipeline=shape.pipeline,
        tensor=shape.tensor,
        zero_stage=shape.zero,
        dropout=dropout,
        weight_decay=0.0,
        **more,
    )


@cache
def trained_plainly(model, dropout, count=MICRO_BATCHES):
    """Loss, norm before clipping and tokens of each step; the parameters after the last."""
    config = config_of(model, Shape(), dropout)
    net = build_model(config.model, VOCABULARY, config.run.seed)
    own = config.optimizer
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, betas=own.betas, eps=own.eps)
    history = []
    for step in range(1, STEPS + 1):
        batches = [make_batch(index, step).trimmed() for index in range(count)]
        tokens = sum(int((batch.loss_weight > 0).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            scores = net.head.scores(net.hidden(batch.inputs, torch.tensor([step, batch.index])))
            losses = F.cross_entropy(
                scores.flatten(0, 1),
                batch.labels.flatten().long(),
                label_smoothing=config.train.label_smoothing,
                reduction="none",
            )
            loss = (losses * batch.loss_weight.flatten()).sum() / tokens
            loss.backward()
            total += loss.item()
        norm = sum(float(p.grad.double().square().sum()) for p in net.parameters()) ** 0.5
        for parameter in net.parameters():
            parameter.grad.mul_(min(1.0, own.gradient_clipping / norm))
        optimizer.step()
        optimizer.zero_grad()
        history.append((total, norm, tokens))
    return history, {name: p.detach().numpy() for name, p in net.named_parameters()}


@pytest.mark.parametrize(("model", "shape", "dropout"), cells())
def test_every_shape_trains_as_one_process(gloo_pool, model, shape, dropout):  # noqa: F811
    history, expected = trained_plainly(model, dropout)
    if dropout:
        # The masks are there: the curve is another one than without.
        assert history[0][0] != pytest.approx(trained_plainly(model, 0.0)[0][0][0], abs=1e-3)
    config = config_of(model, shape, dropout)
    for results, parameters, count in gloo_pool.run(shape.ranks, train_with_engine, config, MICRO_BATCHES):
        for result, (loss, norm, tokens) in zip(results, history, strict=True):
            assert result.loss == pytest.approx(loss, rel=1e-5)
            assert result.grad_norm == pytest.approx(norm, rel=1e-5)
            assert result.target_tokens == tokens
        assert parameters.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(parameters[name] - value).max() < 1e-4, name
        assert count == sum(value.size for value in expected.values())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [DP2, PP2, Shape(tensor=2, zero=3), ALL_AXES], ids=str)
def test_bf16_follows_fp32(gloo_pool, shape):  # noqa: F811
    """Within 2e-2 of the losses and 5 % of the norms, as bf16 on one rank is; the ranks agree to the bit."""
    history, _ = trained_plainly("pairs", 0.0)
    config = config_of("pairs", shape, 0.0, precision="bf16")
    found = [results for results, _, _ in gloo_pool.run(shape.ranks, train_with_engine, config, MICRO_BATCHES)]
    assert all(results == found[0] for results in found)
    for result, (loss, norm, _) in zip(found[0], history, strict=True):
        assert result.loss == pytest.approx(loss, abs=2e-2)
        assert result.grad_norm == pytest.approx(norm, rel=5e-2)


def recomputing(config):
    train = config.train.model_copy(update={"activation_checkpointing": True})
    return config.model_copy(update={"train": train})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape"),
    [("pairs", DP2), ("pairs", Shape(data=2, zero=3)), ("pairs", PP2), ("llama", ALL_AXES)],
    ids=lambda value: str(value),
)
def test_layers_that_are_computed_again_give_the_same(gloo_pool, model, shape):  # noqa: F811
    """With dropout: the same masks are drawn again."""
    history, expected = trained_plainly(model, 0.1)
    config = recomputing(config_of(model, shape, 0.1))
    for results, parameters, _ in gloo_pool.run(shape.ranks, train_with_engine, config, MICRO_BATCHES):
        for result, (loss, norm, _) in zip(results, history, strict=True):
            assert (result.loss, result.grad_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
        for name, value in expected.items():
            assert abs(parameters[name] - value).max() < 1e-4, name


def test_layers_are_computed_again_and_only_in_training():
    config = config_of("pairs", Shape(), 0.1)
    model, batch = build_model(config.model, VOCABULARY, 1), make_batch(0, 1)
    calls = []
    for layer in model.layers(SelfAttentionLayer):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = (batch.inputs, torch.tensor([1, 0]), batch.labels, batch.loss_weight)
    gradients = []
    for recomputes in (False, True):
        model.recomputes = recomputes
        model.zero_grad()
        calls.clear()
        model(*arguments).loss.backward()
        assert len(calls) == (1 + recomputes) * config.model.encoder_layers
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    calls.clear()
    model.eval()(*arguments).loss.backward()
    assert len(calls) == config.model.encoder_layers
