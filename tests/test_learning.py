"""What the models must be able to learn: copying, reversing, and recalling what stood far back (minutes, slow)."""

import pytest
import torch
from torch import nn

from configs.schema import AttentionSection, ModelSection
from model.generation import greedy
from model.transformer import build_model

pytestmark = pytest.mark.slow

BOS, EOS, FIRST = 1, 2, 3
SYMBOLS, LONGEST = 20, 16


def texts(count, random):
    lengths = torch.randint(4, LONGEST + 1, (count,), generator=random).tolist()
    return [torch.randint(FIRST, FIRST + SYMBOLS, (length,), generator=random).tolist() for length in lengths]


def columns(rows):
    tokens, segments = torch.zeros(len(rows), LONGEST + 1, dtype=torch.int64), None
    segments = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        segments[number, : len(row)] = 1
    return tokens, torch.arange(LONGEST + 1).expand_as(tokens), segments


def exact_match(answer, attention, steps):
    section = ModelSection(
        d_model=64, heads=4, d_ff=128, encoder_layers=2, decoder_layers=2, dropout=0.0, attention=attention
    )
    model = build_model(section, FIRST + SYMBOLS, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9)
    random = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(step / 200, (steps - step) / (steps - 200))
        sources = texts(64, random)
        targets = [[*answer(source), EOS] for source in sources]
        labels, positions, segments = columns(targets)
        inputs = columns([[BOS, *target[:-1]] for target in targets])[0]
        weight = segments.float()
        sums = model((*columns(sources), inputs, positions, segments), torch.tensor([step, 0]), labels, weight)
        optimizer.zero_grad()
        (sums.loss / weight.sum()).backward()
        optimizer.step()
    fresh = texts(500, torch.Generator().manual_seed(1))
    outputs = greedy(model, fresh, BOS, EOS, LONGEST + 2)
    right = [output == [*answer(source), EOS] for source, output in zip(fresh, outputs, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    ("answer", "attention"),
    [
        pytest.param(list, AttentionSection(), id="copy"),
        pytest.param(lambda source: source[::-1], AttentionSection(), id="reverse"),
        pytest.param(list, AttentionSection(kind="window", window_tokens=4), id="copy with windows"),
    ],
)
def test_an_encoder_decoder_learns_to_copy_and_to_reverse(answer, attention):
    assert exact_match(answer, attention, steps=1500) > 0.99


KEYS, NOISE = 16, 16
QUERY = KEYS + NOISE


def recall_batch(distance, count, random):
    """Rows `key noise... QUERY` and the key, which stands `distance` tokens before the place of the answer."""
    keys = torch.randint(0, KEYS, (count, 1), generator=random)
    noise = torch.randint(KEYS, KEYS + NOISE, (count, distance - 2), generator=random)
    return torch.cat((keys, noise, torch.full((count, 1), QUERY)), 1), keys.squeeze(1)


class Lstm(nn.Module):
    def __init__(self, vocabulary, width, layers):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class Last(nn.Module):
    """Our decoder's scores of the token after the last one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        nothing, ones = tokens[:, :0], torch.ones_like(tokens)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        hidden = self.model.hidden((nothing, nothing, nothing, tokens, positions, ones), torch.zeros(2).long())[0]
        return self.model.head.logits(hidden[:, -1])


def recall(network, distance, steps, rate, batch=64):
    """Share of right answers on new rows after training on `steps` batches of this distance."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    random = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 100)
        tokens, values = recall_batch(distance, batch, random)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(tokens), values).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    tokens, values = recall_batch(distance, 1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (network(tokens).argmax(-1) == values).float().mean().item()


def decoder():
    section = ModelSection(
        architecture="decoder",
        d_model=64,
        heads=4,
        d_ff=128,
        decoder_layers=2,
        dropout=0.0,
        positions="rotary",
        norm_placement="pre",
        scale_embeddings=False,
    )
    return Last(build_model(section, QUERY + 1, seed=0))


def lstm():
    torch.manual_seed(0)
    return Lstm(QUERY + 1, 64, 2)


def test_a_transformer_recalls_over_64_tokens():
    network, other = decoder(), lstm()
    sizes = [sum(p.numel() for p in each.parameters()) for each in (network, other)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25
    assert recall(network, 64, 800, 2e-3) > 0.95
