"""Quantization-aware training against a plain loop that rounds its own copy of the weights before each pass."""

import pytest
import torch
import torch.nn.functional as F

from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import TrainSection
from model.packed import Int8Weight, pack
from model.quantize import matrices, quantize
from model.rounding import KIND_OF, Rounding, round_weights
from model.transformer import build_model
from tests.gloo_pool import gloo_pool  # noqa: F401
from tests.test_end_to_end import TINY
from tests.test_engine import VOCABULARY, make_batch
from tests.test_model_variants import LLAMA, randomised, section
from tests.test_parity_matrix import DP2, MICRO_BATCHES, PP2, RATE, STEPS, Shape, config_of, train_with_engine


def rounded(net, kind):
    """The model's parameters with its matrices as packing rounds them."""
    found = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    return found | {name: pack(found[name], KIND_OF[kind]).dense() for name in matrices(net)}


def train_section(kind):
    return TrainSection(steps=1, global_batch_sequences=4, micro_batch_sequences=4, quantize=kind)


def loss_of(net, batch, step=1, smoothing=0.0):
    scores = net.head.scores(net.hidden(batch.inputs, torch.tensor([step, batch.index])))
    losses = F.cross_entropy(
        scores.flatten(0, 1), batch.labels.flatten().long(), label_smoothing=smoothing, reduction="none"
    )
    return (losses * batch.loss_weight.flatten()).sum()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["encoder-decoder", "llama"])
def test_losses_and_gradients_are_those_of_rounded_weights(layout, kind):
    chosen = section(**LLAMA) if layout == "llama" else section()
    net, reference = (randomised(chosen) for _ in range(2))
    batch = make_batch(0, 1).trimmed()
    plain = loss_of(net, batch).item()
    round_weights(net, train_section(kind))
    reference.load(rounded(reference, kind))
    loss, expected = loss_of(net, batch), loss_of(reference, batch)
    assert loss.item() == expected.item() != plain
    # The loss that training takes, over chunks.
    sums = net(batch.inputs, torch.tensor([1, 0]), batch.labels, batch.loss_weight)
    assert sums.nll.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=0)


def test_training_sees_what_packing_makes():
    net, packed = randomised(section()), randomised(section())
    round_weights(net, train_section("int8"))
    quantize(packed, Int8Weight.kind)
    batch = make_batch(0, 1).trimmed()
    with torch.no_grad():
        # Activations are exact to 15 bits in the packed model.
        torch.testing.assert_close(net.logits(batch.inputs), packed.logits(batch.inputs), rtol=1e-3, atol=1e-3)


def test_rounding_keeps_the_dtype_and_passes_gradients():
    weight = torch.randn(3, 70).bfloat16().requires_grad_()
    result = Rounding("int4-group")(weight)
    assert result.dtype is torch.bfloat16 and len(result[0].unique()) < 33
    result.float().square().sum().backward()
    torch.testing.assert_close(weight.grad, (2 * result).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallelism": {"tensor": 2, "data": 1}}, "train.quantize.*parallelism.tensor to 1"),
        ({"model": {**TINY["model"], "architecture": "encoder", "classes": 2}}, "train.quantize.*encoder"),
    ],
)
def test_what_cannot_be_rounded_is_refused(change, message):
    tree = {**TINY, **change, "train": {**TINY["train"], "quantize": "int8"}}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, "test")


def trained_on_rounded_weights(kind):
    """Losses, and the masters after the last step, as a plain loop has them."""
    config = config_of("pairs", Shape(), 0.1)
    net = build_model(config.model, VOCABULARY, config.run.seed)
    masters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    own = config.optimizer
    optimizer = torch.optim.Adam(masters.values(), lr=RATE, betas=own.betas, eps=own.eps)
    losses = []
    for step in range(1, STEPS + 1):
        net.load(masters)
        net.load(rounded(net, kind))
        net.zero_grad()
        batches = [make_batch(index, step).trimmed() for index in range(MICRO_BATCHES)]
        tokens = sum(int((batch.loss_weight > 0).sum()) for batch in batches)
        total = sum(loss_of(net, batch, step, config.train.label_smoothing) for batch in batches) / tokens
        total.backward()
        norm = sum(float(p.grad.double().square().sum()) for p in net.parameters()) ** 0.5
        for name, parameter in net.named_parameters():
            masters[name].grad = parameter.grad * min(1.0, own.gradient_clipping / norm)
        optimizer.step()
        losses.append(total.item())
    return losses, {name: master.detach().numpy() for name, master in masters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [DP2, PP2, Shape(data=2, zero=3)], ids=str)
def test_engines_train_on_rounded_weights(gloo_pool, shape, kind):  # noqa: F811
    """Losses to 1e-3 and masters to 2e-3: a weight on the edge of two levels may fall to either side."""
    losses, expected = trained_on_rounded_weights(kind)
    config = config_of("pairs", shape, 0.1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"quantize": kind})})
    for results, parameters, _ in gloo_pool.run(shape.ranks, train_with_engine, config, MICRO_BATCHES):
        assert [result.loss for result in results] == pytest.approx(losses, rel=1e-3)
        for name, value in expected.items():
            assert abs(parameters[name] - value).max() < 2e-3, name
