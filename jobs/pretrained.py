"""Starting from weights that exist: `model.init_from: hf:DIR`, a directory of transformers in Llama's layout.

Fields of the configuration that are not given are taken from the directory when a run is submitted; ranks read the
weights when there is no checkpoint yet.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import fsspec
import torch
from fsspec.core import url_to_fs
from safetensors.torch import load
from torch import Tensor

from cluster.storage import absolute_url
from configs.errors import ConfigError
from configs.schema import ModelSection, RunConfig, TokenizerSection
from data.inputs import read_given_tokenizer
from data.tokenizer import Tokenizer
from model.llama_layout import import_llama, llama_section
from model.transformer import initial_parameter

KIND = "hf:"
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def with_pretrained(config: RunConfig, folder: str) -> RunConfig:
    """`config` with what the directory of `model.init_from` says; a local one is relative to `folder`.

    Raises ConfigError for a directory that cannot be read or is computed otherwise, for a given field that differs, and
    for a given tokenizer with other tokens; DataError for one that cannot be read.
    """
    if config.model.init_from is None:
        return config
    place = absolute_url(config.model.init_from.removeprefix(KIND), base=folder)
    theirs = _json(place, CONFIG)
    found = {**llama_section(theirs), "init_from": KIND + place}
    for name in config.model.model_fields_set - {"init_from"}:
        given = getattr(config.model, name)
        if name in found and given != found[name]:
            raise ConfigError(
                f"model.{name}: {given!r} is given, the weights of {place} have {found[name]!r}; remove the field, or "
                "init_from"
            )
    model = ModelSection(**{**{name: getattr(config.model, name) for name in config.model.model_fields_set}, **found})
    tokenizer = config.data.tokenizer
    if tokenizer.path is None:
        tokenizer = tokenizer.model_copy(update={"path": f"{place}/{TOKENIZER}", **_special_tokens(place)})
    else:
        given = tokenizer.model_copy(update={"path": absolute_url(tokenizer.path, base=folder)})
        _check_tokens(place, theirs.get("vocab_size"), given)
    data = config.data.model_copy(update={"tokenizer": tokenizer})
    return config.model_copy(update={"model": model, "data": data})


def initial_parameters(model: ModelSection, vocabulary_size: int, seed: int) -> dict[str, Tensor] | None:
    """The parameters that training starts from by our names, float32, or None without `init_from`.

    Tokens that the prepared data has beyond the directory's get embeddings as in a fresh run. Rows that no token has
    (tables are often padded to a multiple of 64) are left out.
    """
    if model.init_from is None:
        return None
    place = model.init_from.removeprefix(KIND)
    _, parameters = import_llama(_json(place, CONFIG), _Weights(place))
    rows = parameters["embedding.weight"].shape[0]
    kept = min(rows, vocabulary_size)
    if kept < rows:
        logging.info("%s: the last %d of %d embeddings have no token and are left out", place, rows - kept, rows)
    for name in {"embedding.weight", "head.weight"} & parameters.keys():
        whole = initial_parameter(name, torch.Size((vocabulary_size, model.d_model)), seed, model)
        whole[:kept] = parameters[name][:kept]
        parameters[name] = whole
    return {name: tensor.float() for name, tensor in parameters.items()}


class _Weights:
    """Reads tensors by name from one file or from those of an index; each file is read once."""

    def __init__(self, place: str) -> None:
        self._place, self._files = place, {}
        self._index = _json(place, INDEX)["weight_map"] if _exists(place, INDEX) else None

    def __call__(self, name: str) -> Tensor:
        file = WEIGHTS if self._index is None else self._index.get(name)
        if file is not None and file not in self._files:
            self._files[file] = load(_bytes(self._place, file))
        if name not in self._files.get(file, ()):
            raise ConfigError(
                f"model.init_from: {self._place} lacks the weight {name}; export it again, without quantization"
            )
        return self._files[file][name]


def _check_tokens(place: str, rows: int | None, given: TokenizerSection) -> None:
    """Raise ConfigError unless all text tokens of the directory's tokenizer have the same ids in the `given` one.

    More tokens are fine. A directory without tokenizer.json must not have more `rows` of embeddings than tokens.
    """
    content = read_given_tokenizer(given)
    size, ours = Tokenizer.load(content).vocabulary_size, _token_ids(json.loads(content))
    advice = f"remove data.tokenizer, so that {place}/{TOKENIZER} is used"
    if _exists(place, TOKENIZER):
        tree = _json(place, TOKENIZER)
        special = {token["content"] for token in tree.get("added_tokens", ()) if token["special"]}
        theirs = {token: number for token, number in _token_ids(tree).items() if token not in special}
        differing = next((token for token, number in theirs.items() if ours.get(token) != number), None)
        if differing is None:
            return
        example = f"{differing!r} is {theirs[differing]} there and {ours.get(differing, 'absent')} here"
    elif rows is None or rows <= size:
        return
    else:
        example = f"{rows - size} rows have no token"
        advice = f"name the tokenizer.json that these weights were trained with, or put it into {place}"
    raise ConfigError(
        f"data.tokenizer.path: {given.path} has {size} tokens, the weights of {place} have embeddings of {rows} others "
        f"({example}); {advice}"
    )


def _token_ids(tree: dict[str, Any]) -> dict[str, int]:
    """Ids by token of a parsed tokenizer.json."""
    vocabulary = tree["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tree.get("added_tokens", ())}


def _special_tokens(place: str) -> dict[str, str]:
    """Names of the special tokens by tokenizer_config.json; none where it has no bos and eos."""
    said = _json(place, TOKENIZER_CONFIG) if _exists(place, TOKENIZER_CONFIG) else {}
    names = {name: said.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    names = {name: value["content"] if isinstance(value, dict) else value for name, value in names.items()}
    if names["bos"] is None or names["eos"] is None:
        return {}
    if names["pad"] in (names["bos"], names["eos"]):
        names["pad"] = None
    return {name: value for name, value in names.items() if value is not None}


def _exists(place: str, file: str) -> bool:
    filesystem, path = url_to_fs(f"{place}/{file}")
    return filesystem.exists(path)


def _json(place: str, file: str) -> Any:
    try:
        return json.loads(_bytes(place, file))
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.init_from: {place}/{file} is no JSON ({error})") from error


def _bytes(place: str, file: str) -> bytes:
    try:
        with fsspec.open(f"{place}/{file}", "rb") as opened:
            return opened.read()
    except OSError as error:
        raise ConfigError(
            f"model.init_from: {place}/{file} cannot be read ({error}); name a directory that save_pretrained of "
            "transformers wrote"
        ) from error
