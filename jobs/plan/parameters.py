"""The model as its matrices: which parameters there are, by part, and which matrix works on which tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from configs.schema import ModelSection, RunConfig


@dataclass(frozen=True)
class Matrix:
    """A weight `[outputs, inputs]`, and how tensor parallelism cuts it (Shoeybi et al. 2019, section 3).

    `column` cuts the outputs, `row` the inputs, after which ranks add up. `over_source` says that it works on the
    tokens of the source.
    """

    name: str
    inputs: int
    outputs: int
    cut: Literal["column", "row"]
    over_source: bool = False

    @property
    def elements(self) -> int:
        """Weights in it."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Stack:
    """Equal layers, one behind the other, each with `matrices`, and `norms` norms of width d_model.

    `tokens` are those of one sample that pass, `memory_tokens` those that its cross-attention looks at (0: none).
    """

    name: Literal["encoder", "decoder"]
    depth: int
    matrices: tuple[Matrix, ...]
    norms: int
    tokens: int
    memory_tokens: int
    causal: bool


@dataclass(frozen=True)
class Shape:
    """What the arithmetic of a plan needs to know of a model and its samples."""

    model: ModelSection
    vocabulary: int
    stacks: tuple[Stack, ...]
    source_tokens: int
    target_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of one sample, source and target together."""
        return self.source_tokens + self.target_tokens

    @property
    def layers(self) -> int:
        """Layers of all stacks."""
        return sum(stack.depth for stack in self.stacks)

    @property
    def scored_tokens(self) -> int:
        """Positions of one sample at which the head works."""
        return self.target_tokens if self.model.architecture != "encoder" else 1

    @property
    def head_outputs(self) -> int:
        """Scores that the head gives at each of them."""
        return self.vocabulary if self.model.architecture != "encoder" else self.model.class_count


def shape_of(config: RunConfig) -> Shape:
    """The shape of the configured model; the vocabulary is the configured size, which few texts may not fill."""
    model, data = config.model, config.data
    with_source = model.architecture != "decoder"
    with_target = model.architecture != "encoder"
    source = data.source_tokens if with_source else 0
    target = data.target_tokens if with_target else 0
    stacks = []
    if with_source:
        stacks.append(Stack("encoder", model.encoder_layers, _layer(model, True, False), 2, source, 0, False))
    if with_target:
        across = with_source
        matrices = _layer(model, False, across)
        stacks.append(
            Stack("decoder", model.decoder_layers, matrices, 2 + across, target, source if across else 0, True)
        )
    return Shape(model, data.tokenizer.vocabulary_size, tuple(stacks), source, target)


def parameters_by_part(shape: Shape) -> dict[str, int]:
    """Parameters of each part, those of 0 left out; their sum is what the optimizer updates."""
    model = shape.model
    parts = {"embedding": shape.vocabulary * model.d_model}
    if model.positions == "learned":
        tables = 2 if model.architecture == "encoder_decoder" else 1
        parts["positions"] = tables * model.max_positions * model.d_model
    for stack in shape.stacks:
        groups = {"attention": ("self.",), "cross-attention": ("cross.",), "feed-forward": ("feed_forward.",)}
        for group, prefix in groups.items():
            chosen = [matrix for matrix in stack.matrices if matrix.name.startswith(prefix)]
            biases = sum(matrix.outputs for matrix in chosen) if model.bias else 0
            parts[f"{stack.name} {group}"] = stack.depth * (sum(m.elements for m in chosen) + biases)
        ends = 1 if model.norm_placement == "pre" else 0
        parts[f"{stack.name} norms"] = (stack.depth * stack.norms + ends) * _norm(model)
    if model.architecture == "encoder":
        parts["classifier"] = (model.d_model + 1) * model.class_count
    elif not model.tie_embeddings:
        parts["head"] = shape.vocabulary * model.d_model
    return {name: count for name, count in parts.items() if count}


def layer_parameters(shape: Shape, stack: Stack) -> int:
    """Parameters of one layer."""
    biases = sum(matrix.outputs for matrix in stack.matrices) if shape.model.bias else 0
    return sum(matrix.elements for matrix in stack.matrices) + biases + stack.norms * _norm(shape.model)


def hidden_matrix_elements(shape: Shape) -> int:
    """Weights of the matrices of all layers: what Muon orthogonalises."""
    return sum(stack.depth * sum(matrix.elements for matrix in stack.matrices) for stack in shape.stacks)


def _norm(model: ModelSection) -> int:
    return model.d_model * (2 if model.norm == "layer" else 1)


def _layer(model: ModelSection, over_source: bool, across: bool) -> tuple[Matrix, ...]:
    return tuple(_matrices(model, over_source, across))


def _matrices(model: ModelSection, over_source: bool, across: bool) -> Iterator[Matrix]:
    d_model, width = model.d_model, model.width_of_heads
    wide, narrow = width * model.heads, width * model.heads_of_keys
    for prefix, of_keys in (("self", over_source), *((("cross", True),) if across else ())):
        yield Matrix(f"{prefix}.query", d_model, wide, "column", over_source)
        yield Matrix(f"{prefix}.key", d_model, narrow, "column", of_keys)
        yield Matrix(f"{prefix}.value", d_model, narrow, "column", of_keys)
        yield Matrix(f"{prefix}.output", wide, d_model, "row", over_source)
    yield Matrix("feed_forward.inner", d_model, model.d_ff, "column", over_source)
    if model.feed_forward == "swiglu":
        yield Matrix("feed_forward.gate", d_model, model.d_ff, "column", over_source)
    yield Matrix("feed_forward.outer", model.d_ff, d_model, "row", over_source)
