"""Names of a Llama's weights in transformers, and the way in from a directory of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from configs.errors import ConfigError

LLAMA = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention_output.norm": "input_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.inner": "mlp.up_proj",
    "feed_forward.outer": "mlp.down_proj",
    "feed_forward_output.norm": "post_attention_layernorm",
}
NEEDED = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
LLAMA_ENDS = {"embedding": "model.embed_tokens", "decoder_end.norm": "model.norm", "head": "lm_head"}


def llama_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model section for a directory in Llama's layout, of its config.json.

    Raises ConfigError for what our model does not compute: another family, scaled or partial rotary positions, biases,
    another activation, quantized weights; and for a size that is not there.
    """
    _same("model_type", config.get("model_type"), "llama")
    for field in NEEDED:
        if field not in config:
            raise ConfigError(f"model.init_from: config.json has no {field}; save the model again with save_pretrained")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for field, found, needed in (
        ("rope_parameters.rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        (
            "head_dim",
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            config["hidden_size"] // config["num_attention_heads"],
        ),
        ("quantization_config", config.get("quantization_config"), None),
    ):
        _same(field, found, needed)
    return {
        "architecture": "decoder",
        "d_model": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "d_ff": config["intermediate_size"],
        "decoder_layers": config["num_hidden_layers"],
        "positions": "rotary",
        "rotary_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "norm": "rms",
        "norm_placement": "pre",
        "norm_eps": config["rms_norm_eps"],
        "feed_forward": "swiglu",
        "bias": False,
        "scale_embeddings": False,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _same(field: str, found: Any, needed: Any) -> None:
    if found != needed:
        raise ConfigError(f"model.init_from: config.json has {field} = {found!r}; this model computes with {needed!r}")


def import_llama(config: Mapping[str, Any], read: Callable[[str], Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The way in: `llama_section` of config.json, and parameters by our names; `read` gives a tensor by its name there.

    Raises ConfigError for what our model does not compute.
    """
    section = llama_section(config)
    tied = section["tie_embeddings"]
    parameters = {
        f"{ours}.weight": read(f"{theirs}.weight") for ours, theirs in LLAMA_ENDS.items() if ours != "head" or not tied
    }
    for number in range(config["num_hidden_layers"]):
        for ours, theirs in LLAMA.items():
            parameters[f"decoder_{number}.{ours}.weight"] = read(f"model.layers.{number}.{theirs}.weight")
    return section, parameters
