"""`telar export`: a trained run as a directory that Hugging Face transformers loads."""

from __future__ import annotations

import json
from typing import Any

from jobs.commands.folders import new_folder
from jobs.commands.runs import RunPlace


def export_run(place: RunPlace, folder: str, step: int | None = None, average: int = 1) -> dict[str, Any]:
    """Write weights, configuration and tokenizer into `folder`, which must not exist; whole or not at all.

    Returns class name, folder and parameters. Raises ConfigError when the folder exists or the model has no
    counterpart.
    """
    from safetensors.torch import save_file

    from jobs.loading import load_trained
    from model.export import SpecialTokens, export
    from model.quantize import dense_parameters

    with new_folder(folder) as made:
        config = place.config()
        trained = load_trained(place.storage, place.name, config, step, average)
        tokenizer, data, parameters = trained.tokenizer, config.data, dense_parameters(trained.model)
        exported = export(
            config.model,
            parameters,
            trained.manifest.vocabulary_size,
            SpecialTokens(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id),
            # Positions of the source and of the target alike; a decoder also reads bos.
            positions=max(data.source_tokens, data.target_tokens) + 1,
        )
        save_file(exported.tensors, made / "model.safetensors", metadata={"format": "pt"})
        for name, content in (
            ("config.json", exported.config),
            ("generation_config.json", exported.generation),
            ("tokenizer_config.json", _tokenizer_config(exported.architecture)),
        ):
            (made / name).write_text(json.dumps(content, indent=1) + "\n")
        (made / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    return {
        "class": exported.architecture,
        "folder": folder,
        "steps": list(trained.steps),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
    }


def _tokenizer_config(architecture: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        # Sources of our encoder-decoders carry no end token, prompts of decoders start with bos (added by hand).
        "model_input_names": ["input_ids", "attention_mask"],
        "extra_special_tokens": {},
        "name_or_path": architecture,
    }
