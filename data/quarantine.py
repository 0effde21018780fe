"""Shards damaged in storage with no good copy elsewhere: kept by name, allowed up to a share of all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from configs.errors import DataError
from data.manifest import Manifest, ShardInfo

NAMED = 10


class QuarantinedShard(DataError):
    """This shard cannot be had; its samples are to be masked. `path` is the shard's path in the data folder."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple:
        return QuarantinedShard, (self.path, str(self))


class Quarantine:
    """The quarantined shards of one run and the share of all tokens that they may hold."""

    def __init__(self, total_tokens: int, fraction: float) -> None:
        """`total_tokens` of the manifest; `fraction` is `data.quarantine_fraction`."""
        self._total, self._fraction = total_tokens, fraction
        self._tokens: dict[str, int] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._tokens

    @property
    def tokens(self) -> int:
        """Tokens in quarantined shards."""
        return sum(self._tokens.values())

    def add(self, shard: ShardInfo, reason: str) -> QuarantinedShard:
        """Quarantine a shard (again is fine); the error to raise where its samples are wanted.

        Raises DataError that names all quarantined shards when they hold more than the budget.
        """
        self._tokens[shard.path] = shard.source_tokens + shard.target_tokens
        self.check(reason)
        return self.error(shard.path, reason)

    def error(self, path: str, reason: str = "it was found damaged before") -> QuarantinedShard:
        """The error to raise where samples of a quarantined shard are wanted."""
        return QuarantinedShard(path, f"shard {path} is quarantined, its samples are masked: {reason}")

    def check(self, reason: str) -> None:
        """Raise DataError when quarantined shards hold more tokens than the budget."""
        if self.tokens > self._fraction * self._total:
            paths = list(self._tokens)
            more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
            raise DataError(
                f"{reason}. Damaged shards now hold {self.tokens} of {self._total} tokens, more than "
                f"data.quarantine_fraction = {self._fraction:g} allows: {', '.join(paths[:NAMED])}{more}"
            )

    def state(self) -> list[str]:
        """Paths of quarantined shards, for a checkpoint (JSON)."""
        return sorted(self._tokens)

    def restore(self, shards: Iterable[ShardInfo]) -> None:
        """Quarantine what an earlier state named; raises DataError past the budget."""
        for shard in shards:
            self._tokens[shard.path] = shard.source_tokens + shard.target_tokens
        if self._tokens:
            self.check("The state of the run names quarantined shards")


def total_tokens(manifest: Manifest) -> int:
    """Source and target tokens of all shards."""
    return sum(corpus.source_tokens + corpus.target_tokens for corpus in manifest.corpora)


def shards_named(manifest: Manifest, paths: Sequence[str]) -> list[ShardInfo]:
    """The shards of those paths; raises DataError for a path that the manifest does not list."""
    if not paths:
        return []
    wanted = set(paths)
    found = [shard for corpus in manifest.corpora for shard in corpus.shards if shard.path in wanted]
    if unknown := wanted - {shard.path for shard in found}:
        raise DataError(
            f"{manifest.folder}: no shard {min(unknown)!r}, which the run's state says is quarantined; resume with "
            "the data that the run was started with"
        )
    return found
