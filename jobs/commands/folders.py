"""Folders that a command makes: whole or not at all, and never over what is there."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError


@contextmanager
def new_folder(folder: str) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all went well; raises ConfigError when that exists."""
    target = Path(folder)
    if target.exists():
        raise ConfigError(f"DIR: {folder} exists; name a folder that does not, nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
