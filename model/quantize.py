"""A model whose matrices are packed: in memory and in files they stay integers, products take them as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from model.checkpoint import CheckpointReader
from model.fragments import WEIGHT, Fragment
from model.packed import KINDS, PackedWeight, pack, stored
from model.transformer import Transformer

SCALE = "scale"


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a packed matrix `[out_features, in_features]` and the bias as it was."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        result = self.weight.linear(x)
        return result if self.bias is None else result + self.bias


def matrices(model: Transformer) -> list[str]:
    """Names of the parameters that are packed: all matrices of linear layers, the embedding, and an untied head.

    Biases, norms and tables of learned positions stay float32.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, _ in model.named_parameters() if name in linear | {"embedding.weight", "head.weight"}]


def quantize(model: Transformer, kind: str, group: int = 64) -> None:
    """Pack all `matrices` in place, one of KINDS; an embedding that also is the output projection once."""
    named = dict(model.named_parameters())
    install(model, {name: pack(named[name], kind, group) for name in matrices(model)})


def install(model: Transformer, packed: Mapping[str, PackedWeight]) -> None:
    """Put packed matrices in the place of the parameters of these names.

    Raises KeyError for a name that is no parameter and ValueError for another shape.
    """
    named = dict(model.named_parameters())
    for name, weight in packed.items():
        if named[name].shape != weight.shape:
            raise ValueError(f"{name}: {tuple(weight.shape)} given, {tuple(named[name].shape)} expected")
        parent, _, _ = name.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(module, nn.Linear):
            above, _, own = parent.rpartition(".")
            setattr(model.get_submodule(above), own, QuantizedLinear(weight, module.bias))
            continue
        for user in list(model.modules()):
            if user._parameters.get("weight") is named[name]:
                del user.weight
                user.weight = weight


def packed_matrices(model: Transformer) -> dict[str, PackedWeight]:
    """Packed matrices by parameter name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def dense_parameters(model: Transformer) -> dict[str, Tensor]:
    """Every parameter by name in its full float form, packed ones too."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {name: weight.dense() for name, weight in packed_matrices(model).items()}


def memory_bytes(model: Transformer) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def model_fragments(model: Transformer) -> list[Fragment]:
    """The whole model for one rank file: float32 weights, and for packed matrices the state of its kind and scales."""
    found = []
    for name, parameter in model.named_parameters():
        found.append(Fragment(name, WEIGHT, tuple(parameter.shape), 0, parameter.detach().float().flatten()))
    for name, weight in packed_matrices(model).items():
        shape = tuple(weight.shape)
        found.append(Fragment(name, weight.kind, shape, 0, weight.values.flatten()))
        found.append(Fragment(name, SCALE, shape, 0, weight.scale.flatten()))
    return found


def read_packed(reader: CheckpointReader) -> dict[str, PackedWeight]:
    """The packed matrices of a checkpoint by name; empty for one that was trained."""
    states, shapes = reader.states(), reader.shapes()
    found = {}
    for name in reader.names():
        for kind in KINDS.keys() & states[name]:
            found[name] = stored(kind, reader.stored(name, kind), reader.stored(name, SCALE), shapes[name])
    return found
