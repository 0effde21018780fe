"""Integrated gradients against differences of the function itself, and faithfulness of orders made by hand."""

import numpy as np
import pytest
import torch

from configs.model_section import ModelSection
from jobs.attributions import SHARES, STEPS, faithfulness, integrated_gradients
from model.batch import ModelBatch
from model.transformer import build_model

PAD, VOCABULARY = 2, 30


def batch_of(decoder):
    """Two candidates of two labels after one source of four tokens; in a decoder the source stands after bos."""
    source, labels = [7, 8, 9, 10], torch.tensor([[11, 0], [12, 13]])
    if decoder:
        written = torch.tensor([[1, *source, 11], [1, *source, 12]])
        labels = torch.cat([torch.zeros(2, 4, dtype=torch.int64), labels], dim=1)
        weight = torch.tensor([[0.0] * 4 + [1.0] * 2] * 2)
        source = []
    else:
        written, weight = torch.tensor([[1, 11], [1, 12]]), torch.ones(2, 2)
    inputs = []
    for tokens in (torch.tensor([source] * 2, dtype=torch.int64), written):
        inputs += [tokens, torch.arange(tokens.shape[1]).expand_as(tokens), torch.ones_like(tokens)]
    return ModelBatch(0, tuple(inputs), labels, weight), slice(1, 5) if decoder else slice(0, 4)


def model_of(decoder):
    section = ModelSection(
        architecture="decoder" if decoder else "encoder_decoder",
        d_model=16,
        heads=2,
        d_ff=32,
        encoder_layers=1,
        decoder_layers=1,
        positions="sinusoidal",
    )
    model = build_model(section, VOCABULARY, seed=4).eval()
    # Untrained models answer everything alike; larger weights make tokens matter.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def score(model, embedded, rest, batch, chosen):
    """The chosen candidate's log-probability among both, from the first layer's output on."""
    state = (embedded, *rest)
    for layer in model.layers()[1:-1]:
        state = layer(state)
    found = model.head.scores(state).log_softmax(-1)
    nats = [
        sum(float(found[row, i, label]) for i, label in enumerate(batch.labels[row]) if batch.loss_weight[row, i] > 0)
        for row in range(2)
    ]
    return nats[chosen] - float(np.logaddexp(*nats))


@pytest.mark.parametrize("decoder", [False, True])
def test_attributions_are_those_of_small_steps_along_the_path(decoder):
    model, (batch, place) = model_of(decoder), batch_of(decoder)
    found, gap = integrated_gradients(model, batch, place, PAD, 1)
    reads, key = (3 if decoder else 0), torch.zeros(2, dtype=torch.int64)
    blank = [tensor.clone() for tensor in batch.inputs]
    blank[reads][:, place] = PAD
    with torch.no_grad():
        own, *rest = model.layers()[0]((*batch.inputs, key))
        base = model.layers()[0]((*blank, key))[0]
        expected = []
        for token in (place.start, place.stop - 1):
            # Small beside the path, and large beside what float32 can tell apart.
            along = torch.zeros_like(own)
            along[:, token] = (own - base)[:, token]
            expected.append(
                np.mean(
                    [
                        (
                            score(model, base + a * (own - base) + 0.002 * along, rest, batch, 1)
                            - score(model, base + a * (own - base) - 0.002 * along, rest, batch, 1)
                        )
                        / 0.004
                        for a in (np.arange(STEPS) + 0.5) / STEPS
                    ]
                )
            )
        whole = score(model, own, rest, batch, 1) - score(model, base, rest, batch, 1)
    np.testing.assert_allclose(found[[0, -1]], expected, rtol=0.03, atol=5e-4)
    assert abs(whole) > 1e-3 and found.sum() - whole == pytest.approx(gap, abs=1e-4)
    assert abs(gap) < 0.1 * np.abs(found).sum(), "the sum is the difference to the baseline (completeness)"
    other, _ = integrated_gradients(model, batch, place, PAD, 0)
    assert np.abs(other - found).max() > 1e-4, "each candidate has its own"


def test_faithfulness_by_hand():
    source = np.arange(10, dtype=np.int32) + 5
    asked = []

    def only_eight_counts(sources):
        asked.extend(sources)
        return np.array([0.9 if 8 in tokens else 0.2 for tokens in sources])

    true, false = -np.abs(np.arange(10) - 3.0), np.abs(np.arange(10) - 3.0)
    found = faithfulness(source, true, only_eight_counts)
    assert found["probability"] == 0.9
    assert found["comprehensiveness"] == pytest.approx(0.7) and found["sufficiency"] == pytest.approx(0.0)
    sizes = [len(tokens) for tokens in asked]
    assert sizes[:7] == [10, 9, 1, 8, 2, 5, 5] and SHARES == (0.1, 0.2, 0.5)
    wrong = faithfulness(source, false, only_eight_counts)
    assert wrong["comprehensiveness"] == pytest.approx(0.0) and wrong["sufficiency"] == pytest.approx(0.7)
    assert 0.0 <= found["random_comprehensiveness"] < 0.7 and 0.0 < found["random_sufficiency"] <= 0.7
    assert found["random_comprehensiveness"] == wrong["random_comprehensiveness"], "the same random orders"


def test_one_token_can_be_taken_away():
    found = faithfulness(np.array([5], dtype=np.int32), np.array([1.0]), lambda s: np.array([float(len(t)) for t in s]))
    assert found["comprehensiveness"] == 1.0 and found["sufficiency"] == 0.0
