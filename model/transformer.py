"""Transformers as one list of layers each, and the module that runs the list in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelSection
from model.batch import Inputs, ModelBatch
from model.embedding import Bridge, ClassifiedEmbedding, SourceEmbedding, TargetEmbedding
from model.heads import ClassHead, Head
from model.layers import DecoderLayer, FinalNorm, SelfAttentionLayer
from model.loss import LossSums
from model.mesh import ALONE, Axis
from model.parallel_linear import vocabulary_matrix
from model.seeds import generator
from model.sliced import full_shape, slice_of


@dataclass(frozen=True)
class LayerSpec:
    """One layer, not built yet. Its parameters are named `name.*`; an `embedded` one takes the embedding matrix."""

    name: str
    kind: type[nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    embedded: bool = False

    def build(self, embedding: nn.Parameter) -> nn.Module:
        """The module; `embedding [vocabulary, d_model]` is used by embedded layers only."""
        return self.kind(weight=embedding, **self.arguments) if self.embedded else self.kind(**self.arguments)


def build_layers(
    model: ModelSection, seed: int, label_smoothing: float = 0.0, z_loss: float = 0.0, tensor: Axis = ALONE
) -> list[LayerSpec]:
    """The layers in the order in which they run; `seed` is the run's and decides dropout.

    They hold what this rank of `tensor` has of them.
    """

    def layer(name: str, kind: type[nn.Module], **more: Any) -> LayerSpec:
        embedded = kind not in (SelfAttentionLayer, DecoderLayer)
        return LayerSpec(name, kind, {"model": model, "seed": seed, "name": name, "tensor": tensor, **more}, embedded)

    def stack(name: str, kind: type[nn.Module], depth: int, **more: Any) -> list[LayerSpec]:
        return [layer(f"{name}_{i}", kind, **more) for i in range(depth)]

    def ended(layers: list[LayerSpec], name: str, hands_on_hidden: bool) -> list[LayerSpec]:
        """The stack with its last layer handing on `hidden` alone where asked, and a norm behind pre-norm layers."""
        if hands_on_hidden:
            last = layers[-1]
            layers = [*layers[:-1], LayerSpec(last.name, last.kind, {**last.arguments, "last": True})]
        pre = model.norm_placement == "pre"
        return [*layers, LayerSpec(f"{name}_end", FinalNorm, {"model": model})] if pre else layers

    encoder = stack("encoder", SelfAttentionLayer, model.encoder_layers)
    losses = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    head = LayerSpec("head", Head, {"tied": model.tie_embeddings, "tensor": tensor, **losses}, embedded=True)
    if model.architecture == "encoder":
        classes = LayerSpec("head", ClassHead, {"model": model, "label_smoothing": label_smoothing})
        return [layer("embedding", ClassifiedEmbedding), *ended(encoder, "encoder", False), classes]
    if model.architecture == "decoder":
        decoder = stack("decoder", SelfAttentionLayer, model.decoder_layers, causal=True)
        return [layer("embedding", TargetEmbedding), *ended(decoder, "decoder", True), head]
    decoder = stack("decoder", DecoderLayer, model.decoder_layers)
    return [
        layer("embedding", SourceEmbedding),
        *ended(encoder, "encoder", False),
        layer("bridge", Bridge),
        *ended(decoder, "decoder", True),
        head,
    ]


EMBEDDING, HEAD = "embedding", "head"
NORMAL_STD = 0.02
ONTO_RESIDUAL = (".output.weight", ".outer.weight")


def initial_parameter(name: str, shape: torch.Size, seed: int, model: ModelSection) -> Tensor:
    """The full float32 tensor that the parameter of this name starts from: a function of its arguments alone.

    Biases 0, norms 1. Embeddings that are scaled by sqrt(d_model): N(0, 1 / d_model), so that they have unit variance
    afterwards and tied logits start small; others, and learned positions: N(0, 0.02). Matrices by
    `model.initialisation`: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010), or N(0, 0.02),
    divided by sqrt(2 layers) for those that write onto the residual stream (Radford et al. 2019).
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    random = generator(seed, "initialise", name)
    result = torch.empty(shape)
    if name in ("embedding.weight", "head.weight"):
        return result.normal_(std=model.d_model**-0.5 if model.scale_embeddings else NORMAL_STD, generator=random)
    if name.endswith(".positions"):
        return result.normal_(std=NORMAL_STD, generator=random)
    if model.initialisation == "normal":
        layers = model.encoder_layers if name.startswith("encoder") else model.decoder_layers
        return result.normal_(
            std=NORMAL_STD / (2 * layers) ** 0.5 if name.endswith(ONTO_RESIDUAL) else NORMAL_STD, generator=random
        )
    bound = (6.0 / (shape[0] + shape[1])) ** 0.5
    return result.uniform_(-bound, bound, generator=random)


class Matrix(nn.Module):
    """Nothing but a parameter, `weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Transformer(nn.Module):
    """Runs a list of layers in order; the embedding matrix is one parameter, `embedding.weight`, wherever it serves.

    Of every parameter the module holds what this rank of `tensor` has: `model.sliced` says which part that is. A list
    that is a stage of a pipeline makes a module of that stage, whose parameters have the names of the whole model.
    """

    def __init__(
        self, layers: list[LayerSpec], vocabulary_size: int, section: ModelSection, tensor: Axis = ALONE
    ) -> None:
        super().__init__()
        self.section = section
        # Whether layers are computed again in the backward pass (Chen et al. 2016) instead of keeping what they need.
        self.recomputes = False
        embedding = vocabulary_matrix(vocabulary_size, section.d_model, tensor)
        self.names = [spec.name for spec in layers]
        built = [spec.build(embedding) for spec in layers]
        if self.names[0] != EMBEDDING and any(own is embedding for layer in built for own in layer.parameters()):
            # A later stage that uses the matrix: the first to name it gives it the name that it has everywhere.
            self.add_module(EMBEDDING, Matrix(embedding))
        for name, layer in zip(self.names, built, strict=True):
            self.add_module(name, layer)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to what its name and the run's seed give, or to this rank's part of that."""
        for name, parameter in self.named_parameters():
            _set(parameter, initial_parameter(name, torch.Size(full_shape(parameter)), seed, self.section))

    def begin(self, seed: int, initial: Mapping[str, Tensor] | None) -> None:
        """Set every parameter from those of the whole model in `initial`, else from the run's seed."""
        if initial is None:
            self.initialise(seed)
        else:
            own = {name for name, _ in self.named_parameters()}
            self.load({name: tensor for name, tensor in initial.items() if name in own})

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Set every parameter from full tensors by name; raises KeyError or ValueError when they do not fit.

        On a tensor rank each is cut to its part.
        """
        own = dict(self.named_parameters())
        if own.keys() != parameters.keys():
            raise KeyError(f"parameters differ: {sorted(own.keys() ^ parameters.keys())[:4]}")
        for name, parameter in own.items():
            if full_shape(parameter) != parameters[name].shape:
                raise ValueError(f"{name}: {tuple(parameters[name].shape)} given, {full_shape(parameter)} expected")
            _set(parameter, parameters[name])

    def layers(self, kind: type[nn.Module] | None = None) -> list[nn.Module]:
        """The layers in order, or those of one kind."""
        found = [getattr(self, name) for name in self.names]
        return found if kind is None else [layer for layer in found if isinstance(layer, kind)]

    def hidden(self, inputs: Inputs, key: Tensor | None = None) -> tuple[Tensor, ...]:
        """All layers but the head; the first tensor is the stack's output `[batch, sequence, d_model]`.

        `key` int64 `[2]` on the CPU (step, micro-batch) seeds dropout; needed while training only.
        """
        return self.passed((*inputs, torch.zeros(2, dtype=torch.int64) if key is None else key))

    def passed(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What `state` becomes in these layers, the head left out."""
        for name in self.names:
            if name == HEAD:
                continue
            layer = getattr(self, name)
            if self.recomputes and self.training and isinstance(layer, SelfAttentionLayer | DecoderLayer):
                # Dropout is a function of its key, so there is no state of a generator to put back.
                state = checkpoint(layer, state, use_reentrant=False, preserve_rng_state=False)
            else:
                state = layer(state)
        return state

    def forward(self, inputs: Inputs, key: Tensor | None, labels: Tensor, loss_weight: Tensor) -> LossSums:
        """Loss and nll of a micro-batch, summed over its target tokens."""
        return self.head(self.hidden(inputs, key), labels, loss_weight)

    def logits(self, inputs: Inputs) -> Tensor:
        """Float32 `[batch, target, vocabulary or classes]`: all of them, so for small batches."""
        return self.head.scores(self.hidden(inputs))


def _set(parameter: nn.Parameter, whole: Tensor) -> None:
    part = slice_of(parameter)
    parameter.copy_(whole if part is None else part.of(whole))


def parameter_shapes(model: ModelSection, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of the whole model by name; no memory is taken for them."""
    with torch.device("meta"):
        whole = Transformer(build_layers(model, 0), vocabulary_size, model)
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def build_model(
    model: ModelSection,
    vocabulary_size: int,
    seed: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tensor: Axis = ALONE,
) -> Transformer:
    """The whole model, or what this rank of `tensor` has of it, initialised from the run's seed."""
    layers = build_layers(model, seed, label_smoothing, z_loss, tensor)
    built = Transformer(layers, vocabulary_size, model, tensor)
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
