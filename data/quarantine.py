"""Shards that are damaged in storage and have no good copy anywhere."""

from __future__ import annotations

from configs.errors import DataError


class QuarantinedShard(DataError):
    """This shard cannot be had; its samples are to be masked. `path` is the shard's path in the data folder."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple:
        return QuarantinedShard, (self.path, str(self))
