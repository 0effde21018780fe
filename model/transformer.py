"""The encoder-decoder of Vaswani et al. 2017 as one list of layers, and the module that runs the list in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import ModelSection
from model.batch import Inputs, ModelBatch
from model.layers import Bridge, DecoderLayer, EncoderLayer, Head, SourceEmbedding
from model.loss import LossSums
from model.seeds import generator


@dataclass(frozen=True)
class LayerSpec:
    """One layer, not built yet. Its parameters are named `name.*`; a `tied` one takes the embedding matrix."""

    name: str
    kind: type[nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False

    def build(self, embedding: nn.Parameter) -> nn.Module:
        """The module; `embedding [vocabulary, d_model]` is used by tied layers only."""
        return self.kind(weight=embedding, **self.arguments) if self.tied else self.kind(**self.arguments)


def build_layers(model: ModelSection, seed: int, label_smoothing: float = 0.0) -> list[LayerSpec]:
    """The layers in the order in which they run; `seed` is the run's and decides dropout."""

    def embedding(name: str, kind: type[nn.Module]) -> LayerSpec:
        return LayerSpec(name, kind, {"dropout": model.dropout, "seed": seed, "name": name}, tied=True)

    def block(name: str, kind: type[nn.Module], **more: bool) -> LayerSpec:
        sizes = {"d_model": model.d_model, "heads": model.heads, "d_ff": model.d_ff}
        return LayerSpec(name, kind, {**sizes, "dropout": model.dropout, "seed": seed, "name": name, **more})

    last = model.decoder_layers - 1
    return [
        embedding("embedding", SourceEmbedding),
        *(block(f"encoder_{i}", EncoderLayer) for i in range(model.encoder_layers)),
        embedding("bridge", Bridge),
        *(block(f"decoder_{i}", DecoderLayer, last=i == last) for i in range(model.decoder_layers)),
        LayerSpec("head", Head, {"label_smoothing": label_smoothing}, tied=True),
    ]


def initial_parameter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The full float32 tensor that the parameter of this name starts from: a function of its arguments alone.

    Matrices: Xavier uniform, U(-a, a) with a = sqrt(6 / (fan_in + fan_out)). Embedding: N(0, 1 / d_model), so that it
    has unit variance after its sqrt(d_model) factor and tied logits start small. Biases 0, norms 1.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    random = generator(seed, "initialise", name)
    if name == "embedding.weight":
        return torch.empty(shape).normal_(std=shape[1] ** -0.5, generator=random)
    bound = (6.0 / (shape[0] + shape[1])) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=random)


class Transformer(nn.Module):
    """Runs a list of layers in order; the embedding matrix is one parameter, `embedding.weight`, wherever it serves."""

    def __init__(self, layers: list[LayerSpec], vocabulary_size: int, d_model: int) -> None:
        super().__init__()
        embedding = nn.Parameter(torch.empty(vocabulary_size, d_model))
        self.names = [spec.name for spec in layers]
        for spec in layers:
            self.add_module(spec.name, spec.build(embedding))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to what its name and the run's seed give."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_parameter(name, parameter.shape, seed))

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Set every parameter from full tensors by name; raises KeyError or ValueError when they do not fit."""
        own = dict(self.named_parameters())
        if own.keys() != parameters.keys():
            raise KeyError(f"parameters differ: {sorted(own.keys() ^ parameters.keys())[:4]}")
        for name, parameter in own.items():
            if parameter.shape != parameters[name].shape:
                raise ValueError(f"{name}: {tuple(parameters[name].shape)} given, {tuple(parameter.shape)} expected")
            parameter.copy_(parameters[name])

    def layers(self, kind: type[nn.Module] | None = None) -> list[nn.Module]:
        """The layers in order, or those of one kind."""
        found = [getattr(self, name) for name in self.names]
        return found if kind is None else [layer for layer in found if isinstance(layer, kind)]

    def hidden(self, inputs: Inputs, key: Tensor | None = None) -> tuple[Tensor]:
        """All layers but the head: decoder output `[batch, target, d_model]`, as a tuple of one.

        `key` int64 `[2]` on the CPU (step, micro-batch) seeds dropout; needed while training only.
        """
        state = (*inputs, torch.zeros(2, dtype=torch.int64) if key is None else key)
        for layer in self.layers()[:-1]:
            state = layer(state)
        return state

    def forward(self, inputs: Inputs, key: Tensor | None, labels: Tensor, loss_weight: Tensor) -> LossSums:
        """Loss and nll of a micro-batch, summed over its target tokens."""
        return self.head(self.hidden(inputs, key), labels, loss_weight)

    def logits(self, inputs: Inputs) -> Tensor:
        """Float32 `[batch, target, vocabulary]`: all of them, so for small batches."""
        return self.head.logits(self.hidden(inputs)[0])


def build_model(model: ModelSection, vocabulary_size: int, seed: int, label_smoothing: float = 0.0) -> Transformer:
    """The whole model, initialised from the run's seed."""
    built = Transformer(build_layers(model, seed, label_smoothing), vocabulary_size, model.d_model)
    built.initialise(seed)
    return built


@torch.no_grad()
def token_scores(model: Transformer, batch: ModelBatch, chunk_rows: int = 8) -> tuple[Tensor, Tensor]:
    """For evaluation: nll in nats (float32) and the most probable token (int64), both `[batch, target]`.

    Where `loss_weight` is 0 the nll is 0. Logits exist for `chunk_rows` rows at a time.
    """
    nll, best = [], []
    for start in range(0, batch.labels.shape[0], chunk_rows):
        part = slice(start, start + chunk_rows)
        log_probabilities = model.logits(tuple(tensor[part] for tensor in batch.inputs)).log_softmax(-1)
        of_label = log_probabilities.gather(-1, batch.labels[part].long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nll.append(torch.where(batch.loss_weight[part] > 0, -of_label, torch.zeros_like(of_label)))
        best.append(log_probabilities.argmax(-1))
    return torch.cat(nll), torch.cat(best)


def token_nll(model: Transformer, batch: ModelBatch) -> Tensor:
    """Negative log-likelihood of each label in nats, float32 `[batch, target]`, 0 where `loss_weight` is 0."""
    return token_scores(model, batch)[0]
