"""Exported models against transformers: equal logits on random inputs with padding; the way back in; refusals."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from configs.errors import ConfigError
from configs.schema import AttentionSection
from model.export import SpecialTokens, export
from model.llama_layout import import_llama, llama_section
from model.transformer import Transformer, build_layers
from tests.test_engine import VOCABULARY
from tests.test_model_transformer import plain_inputs
from tests.test_model_variants import DECODER, LLAMA, randomised, section

TOKENS = SpecialTokens(pad=0, bos=1, eos=2)
DECODERS = {
    "post-norm": DECODER,
    "pre-norm, learned positions, GELU": {
        **DECODER,
        "norm_placement": "pre",
        "feed_forward": "gelu",
        "positions": "learned",
        "max_positions": 16,
        "scale_embeddings": False,
    },
    "untied": {**DECODER, "tie_embeddings": False},
    "llama": LLAMA,
    "llama, tied, other base": {**LLAMA, "tie_embeddings": True, "rotary_base": 500.0},
}


def written(model, folder):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exported = export(model.section, parameters, VOCABULARY, TOKENS, positions=16)
    (folder / "config.json").write_text(json.dumps(exported.config))
    save_file(exported.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, found = getattr(transformers, exported.architecture).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    return theirs.eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_an_encoder_decoder_is_a_marian(tmp_path, activation):
    model = randomised(section(feed_forward=activation))
    theirs = written(model, tmp_path)
    inputs = plain_inputs([7, 4, 2], [5, 5, 5])
    expected = theirs(input_ids=inputs[0], attention_mask=inputs[2], decoder_input_ids=inputs[3]).logits
    torch.testing.assert_close(model.logits(inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_decoder_is_an_opt_or_a_llama(tmp_path, name):
    model = randomised(section(**DECODERS[name]))
    theirs = written(model, tmp_path)
    inputs = plain_inputs([1, 1, 1], [7, 4, 2])
    kept = inputs[5] > 0
    expected = theirs(input_ids=inputs[3], attention_mask=inputs[5]).logits
    torch.testing.assert_close(model.logits(inputs)[kept], expected[kept], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_llama_directory_comes_in_with_the_same_logits(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        fields, parameters = import_llama(json.loads((tmp_path / "config.json").read_text()), file.get_tensor)
    imported = section(**fields)
    model = Transformer(build_layers(imported, 0), VOCABULARY, imported).eval()
    model.load(parameters)
    inputs = plain_inputs([1, 1], [7, 4])
    kept = inputs[5] > 0
    expected = theirs(input_ids=inputs[3], attention_mask=inputs[5]).logits
    torch.testing.assert_close(model.logits(inputs)[kept], expected[kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architecture": "encoder"}, "model.architecture"),
        ({"attention": AttentionSection(kind="window")}, "model.attention.kind"),
        ({"norm_placement": "pre"}, "model.norm_placement"),
        ({"feed_forward": "swiglu"}, "model.feed_forward"),
        ({"tie_embeddings": False}, "model.tie_embeddings"),
        ({"key_value_heads": 2}, "model.key_value_heads"),
        ({**DECODER, "norm": "rms"}, "model.norm"),
        ({**LLAMA, "bias": True}, "model.bias"),
        ({**LLAMA, "norm_placement": "post"}, "model.norm_placement"),
    ],
)
def test_what_no_class_computes_is_refused(changes, field):
    model = randomised(section(**changes))
    with pytest.raises(ConfigError, match=field):
        export(model.section, dict(model.named_parameters()), VOCABULARY, TOKENS, 16)


def test_a_llama_that_computes_otherwise_is_refused():
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
    }
    for more, field in (
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral"}, "model_type"),
        ({"head_dim": 16}, "head_dim"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ):
        with pytest.raises(ConfigError, match=field):
            import_llama({**config, **more}, lambda name: pytest.fail(f"{name} was read"))
    for field in ("hidden_size", "rms_norm_eps"):
        with pytest.raises(ConfigError, match=f"config.json has no {field}; save the model again"):
            llama_section({name: value for name, value in config.items() if name != field})
    with pytest.raises(ConfigError, match="model_type = 'gpt2'"):
        llama_section({"model_type": "gpt2", "n_embd": 32})
