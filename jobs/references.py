"""RUN/manifest.json: which prepared data and which codebook, shared by runs, this one uses."""

from __future__ import annotations

import json
from typing import Any

from cluster.storage import Storage
from configs.errors import ConfigError
from data.manifest import Manifest

NAME = "manifest.json"


def write_references(folder: Storage, manifest: Manifest, codebook: str | None) -> None:
    """Write it; `folder` is the run's, `codebook` a folder in storage."""
    refers = {
        "data": manifest.folder,
        "digest": manifest.digest,
        "tokenizer_digest": manifest.tokenizer_digest,
        "vocabulary_size": manifest.vocabulary_size,
        "codebook": codebook,
    }
    folder.write_text(NAME, json.dumps(refers, indent=1))


def references(folder: Storage) -> dict[str, Any]:
    """Its content; raises ConfigError when the run has no prepared data yet."""
    try:
        return json.loads(folder.read_text(NAME))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder.url} has no prepared data yet; run --stage prepare first") from error
