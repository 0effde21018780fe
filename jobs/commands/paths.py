"""Paths of a configuration file made absolute: they are relative to the file, not to where a command runs."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from fsspec.core import split_protocol

from cluster.storage import absolute_url
from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import RunConfig
from jobs.tasks.definitions import absolute_below, with_definitions


def with_absolute_paths(config: RunConfig, file: str, check: bool) -> RunConfig:
    """`config`, read from `file`, with absolute paths, and what `model.init_from` and `evaluate.tasks` say.

    With `check` raises ConfigError when a local one does not exist; the machines of another cluster may have it.
    """
    folder = str(Path(file).absolute().parent)
    if config.model.init_from is not None:
        from jobs.pretrained import with_pretrained

        config = with_pretrained(config, folder)
    config = with_definitions(config, folder)
    for task in config.evaluate.definitions if check else ():
        for column in task.columns if task.kind == "parallel" else [""]:
            _check(task.path.replace("{column}", column), f"evaluate.definitions.{task.name}.path")
    tree = json.loads(config.model_dump_json())
    corpora = folder
    if tree["data"]["datasets"] is not None:
        corpora = tree["data"]["datasets"] = absolute_url(tree["data"]["datasets"], base=folder)
    for corpus in tree["data"]["corpora"]:
        # A Hub name has a scheme and stays; what an hf corpus holds out is a split, not a path.
        for field in ("path",) if corpus["kind"] == "hf" else ("path", "held_out"):
            if corpus[field] is None:
                continue
            corpus[field] = absolute_below(corpus[field], corpora)
            columns = corpus["columns"] if corpus["kind"] == "parallel" else [""]
            for column in columns if check else ():
                _check(corpus[field].replace("{column}", column), f"data.corpora.{corpus['name']}.{field}")
    tokenizer = tree["data"]["tokenizer"]
    if tokenizer["path"] is not None:
        tokenizer["path"] = absolute_url(tokenizer["path"], base=folder)
        if check:
            _check(tokenizer["path"], "data.tokenizer.path")
    return parse_config(tree, file)


def _check(path: str, where: str) -> None:
    # A file's name may hold what looks like a pattern.
    if split_protocol(path)[0] is None and not Path(path).exists() and not glob.glob(path, recursive=True):  # noqa: PTH207
        raise ConfigError(f"{where}: {path} does not exist; paths are relative to the configuration file")
