"""A model's weights and sizes under the names that Hugging Face transformers loads; pure functions of the tensors.

    encoder_decoder, post-norm, sinusoidal, ReLU or GELU, biases, tied   -> MarianMTModel
    decoder, LayerNorm, sinusoidal or learned, ReLU or GELU, biases      -> OPTForCausalLM
    decoder, RMSNorm, pre-norm, rotary, SwiGLU, no biases                -> LlamaForCausalLM

Everything else is refused by the field that stands in the way: no such class of transformers computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import ConfigError
from configs.schema import ModelSection
from model.llama_layout import LLAMA, LLAMA_ENDS
from model.positions import sinusoidal_positions

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that configurations of transformers name."""

    pad: int
    bos: int
    eos: int


@dataclass(frozen=True)
class Exported:
    """`config` is content of config.json, `generation` of generation_config.json."""

    architecture: str
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, Tensor]


def export(
    model: ModelSection, parameters: Parameters, vocabulary_size: int, tokens: SpecialTokens, positions: int
) -> Exported:
    """The export of a model with full parameters by name; `positions` is the longest sequence that is to be read.

    Raises ConfigError naming the field that no class of transformers can represent.
    """
    if model.architecture == "encoder":
        raise ConfigError("model.architecture: encoder has no counterpart that computes the same; it is not exported")
    if model.attention.kind != "full":
        raise ConfigError(
            f"model.attention.kind: {model.attention.kind} has no counterpart in transformers; only full is exported"
        )
    if model.positions != "rotary":
        model, parameters = _with_all_heads(model, parameters)
    if model.architecture == "encoder_decoder":
        return _marian(model, parameters, vocabulary_size, tokens, positions)
    if model.positions == "rotary":
        return _llama(model, parameters, vocabulary_size, tokens, positions)
    return _opt(model, parameters, vocabulary_size, tokens, positions)


def _with_all_heads(model: ModelSection, parameters: Parameters) -> tuple[ModelSection, Parameters]:
    """A pruned model with zeros in the place of the heads that it lacks: it computes the same.

    Marian and OPT know no width of heads other than d_model / heads, and no shared heads of keys (which are left as
    they are here and refused later).
    """
    heads, missing = model.d_model // model.width_of_heads, model.d_model - model.heads * model.width_of_heads
    if model.head_width is None or not missing or model.heads_of_keys != model.heads:
        return model, parameters
    whole = dict(parameters)
    for name, tensor in parameters.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(("attention.query", "attention.key", "attention.value")):
            whole[name] = F.pad(tensor, (0, 0, 0, missing) if kind == "weight" else (0, missing))
        elif name.endswith("attention.output.weight"):
            whole[name] = F.pad(tensor, (0, missing))
    return model.model_copy(update={"heads": heads, "key_value_heads": None, "head_width": None}), whole


def _refuse_unless(model: ModelSection, target: str, **needed: Any) -> None:
    for field, values in needed.items():
        values = values if isinstance(values, tuple) else (values,)
        found = getattr(model, field)
        if found not in values:
            choices = " or ".join(str(value) for value in values if value is not None)
            raise ConfigError(
                f"model.{field}: {target} computes with {choices}, this model with {found}; it cannot be exported "
                "without loss"
            )


def _activation(model: ModelSection) -> str:
    return {"relu": "relu", "gelu": "gelu", "swiglu": "silu"}[model.feed_forward]


def _table(count: int, d_model: int) -> Tensor:
    return sinusoidal_positions(torch.arange(count), d_model)


def _linears(parameters: Parameters, ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights, and biases where there are some, of modules below `ours` under their names below `theirs`."""
    found = {}
    for own, other in names.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{own}.{kind}" in parameters:
                found[f"{theirs}.{other}.{kind}"] = parameters[f"{ours}.{own}.{kind}"].contiguous()
    return found


ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
CLASSIC = {
    **{f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "attention_output.norm": "self_attn_layer_norm",
    "feed_forward.inner": "fc1",
    "feed_forward.outer": "fc2",
    "feed_forward_output.norm": "final_layer_norm",
}
ACROSS = {
    **{f"cross_attention.{ours}": f"encoder_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "cross_attention_output.norm": "encoder_attn_layer_norm",
}


def _marian(
    model: ModelSection, parameters: Parameters, vocabulary_size: int, tokens: SpecialTokens, positions: int
) -> Exported:
    _refuse_unless(
        model,
        "MarianMTModel",
        norm_placement="post",
        norm="layer",
        positions=("sinusoidal",),
        feed_forward=("relu", "gelu"),
        bias=True,
        tie_embeddings=True,
        key_value_heads=(None, model.heads),
        norm_eps=1e-5,
    )
    tensors = {
        "model.shared.weight": parameters["embedding.weight"],
        "final_logits_bias": torch.zeros(1, vocabulary_size),
    }
    for side, depth, names in (
        ("encoder", model.encoder_layers, CLASSIC),
        ("decoder", model.decoder_layers, {**CLASSIC, **ACROSS}),
    ):
        # Its own table has all sines before all cosines; the paper's interleaving is loaded in its place.
        tensors[f"model.{side}.embed_positions.weight"] = _table(positions, model.d_model)
        for number in range(depth):
            tensors.update(_linears(parameters, f"{side}_{number}", f"model.{side}.layers.{number}", names))
    config = {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "vocab_size": vocabulary_size,
        "d_model": model.d_model,
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.decoder_layers,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": model.heads,
        "encoder_ffn_dim": model.d_ff,
        "decoder_ffn_dim": model.d_ff,
        "activation_function": _activation(model),
        "scale_embedding": model.scale_embeddings,
        "dropout": model.dropout,
        "max_position_embeddings": positions,
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "decoder_start_token_id": tokens.bos,
        "tie_word_embeddings": True,
    }
    generation = {"decoder_start_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    return Exported("MarianMTModel", config, generation, tensors)


def _opt(
    model: ModelSection, parameters: Parameters, vocabulary_size: int, tokens: SpecialTokens, positions: int
) -> Exported:
    _refuse_unless(
        model,
        "OPTForCausalLM",
        norm="layer",
        positions=("sinusoidal", "learned"),
        feed_forward=("relu", "gelu"),
        bias=True,
        key_value_heads=(None, model.heads),
        norm_eps=1e-5,
    )
    embedding = parameters["embedding.weight"]
    learned = model.positions == "learned"
    table = parameters["embedding.positions"] if learned else _table(positions, model.d_model)
    scale = math.sqrt(model.d_model) if model.scale_embeddings else 1.0
    head = embedding if model.tie_embeddings else parameters["head.weight"]
    tensors = {
        # It knows no factor on embeddings: it goes into them, and the output projection stays without.
        "model.decoder.embed_tokens.weight": embedding * scale,
        "lm_head.weight": head.clone(),
        # Its first two rows belong to padding.
        "model.decoder.embed_positions.weight": torch.cat([torch.zeros(2, model.d_model), table]),
    }
    for number in range(model.decoder_layers):
        tensors.update(_linears(parameters, f"decoder_{number}", f"model.decoder.layers.{number}", CLASSIC))
    pre = model.norm_placement == "pre"
    if pre:
        tensors.update(_linears(parameters, "decoder_end", "model.decoder", {"norm": "final_layer_norm"}))
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": vocabulary_size,
        "hidden_size": model.d_model,
        "word_embed_proj_dim": model.d_model,
        "num_hidden_layers": model.decoder_layers,
        "num_attention_heads": model.heads,
        "ffn_dim": model.d_ff,
        "activation_function": _activation(model),
        "do_layer_norm_before": pre,
        "dropout": model.dropout,
        "max_position_embeddings": len(table),
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "tie_word_embeddings": False,
    }
    return Exported("OPTForCausalLM", config, _causal(tokens), tensors)


def _llama(
    model: ModelSection, parameters: Parameters, vocabulary_size: int, tokens: SpecialTokens, positions: int
) -> Exported:
    _refuse_unless(
        model,
        "LlamaForCausalLM",
        norm="rms",
        norm_placement="pre",
        feed_forward="swiglu",
        bias=False,
        scale_embeddings=False,
    )
    tensors = {}
    for ours, theirs in LLAMA_ENDS.items():
        if ours != "head" or not model.tie_embeddings:
            tensors[f"{theirs}.weight"] = parameters[f"{ours}.weight"]
    for number in range(model.decoder_layers):
        tensors.update(_linears(parameters, f"decoder_{number}", f"model.layers.{number}", LLAMA))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.decoder_layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads_of_keys,
        "head_dim": model.width_of_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": positions,
        "pad_token_id": tokens.pad,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "tie_word_embeddings": model.tie_embeddings,
    }
    return Exported("LlamaForCausalLM", config, _causal(tokens), tensors)


def _causal(tokens: SpecialTokens) -> dict[str, Any]:
    return {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
