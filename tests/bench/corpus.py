"""The seeded corpora: every loader writes the same rows, and a row can be made anew from the number it carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ID_TOKENS = 2
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Corpus:
    """`shards` x `rows` rows of `width` uint16 tokens; the first two tokens of a row are its number, low half first."""

    name: str
    shards: int
    rows: int
    width: int
    first: int = 0

    @property
    def samples(self) -> int:
        """Rows in all shards."""
        return self.shards * self.rows

    @property
    def bytes(self) -> int:
        """Bytes of the bare tokens."""
        return self.samples * self.width * 2

    def shard(self, number: int) -> np.ndarray:
        """The rows of a shard, uint16 `[rows, width]`."""
        start = self.first + number * self.rows
        return make_rows(np.arange(start, start + self.rows), self.width)

    def all_shards(self) -> Iterator[np.ndarray]:
        """Each shard in turn."""
        return (self.shard(number) for number in range(self.shards))


def make_rows(ids: np.ndarray, width: int) -> np.ndarray:
    """Rows by number, uint16 `[ids, width]`: splitmix64 of the place, so that every bit of a token is checked."""
    with np.errstate(over="ignore"):
        places = ids.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(width, dtype=np.uint64)
        mixed = places * _MIX[0]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[1]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[2]
    rows = (mixed >> np.uint64(48)).astype(np.uint16)
    rows[:, 0], rows[:, 1] = ids & 0xFFFF, ids >> 16
    return rows


def ids_of(rows: np.ndarray) -> np.ndarray:
    """The numbers that rows carry, int64 `[rows]`."""
    return rows[:, 0].astype(np.int64) | rows[:, 1].astype(np.int64) << 16


def wrong_rows(rows: np.ndarray) -> int:
    """How many rows are not what their number says."""
    expected = make_rows(ids_of(rows), rows.shape[1])
    return int((rows != expected).any(axis=1).sum())


def documents(count: int) -> list[np.ndarray]:
    """Documents of lognormal length (median 403 tokens, mean about 830); every token is the document's number + 1."""
    lengths = np.random.default_rng(3).lognormal(6.0, 1.2, count).astype(int) + 2
    return [np.full(length, number + 1, dtype=np.uint16) for number, length in enumerate(lengths)]


SCALES = {
    "full": {"main": (64, 1024, 2049), "light": (64, 1024, 65), "mixture": (16, 512, 65), "documents": 20_000},
    "small": {"main": (16, 512, 2049), "light": (16, 512, 65), "mixture": (16, 256, 65), "documents": 2_000},
}
MIXTURE = (0.7, 0.29, 0.01)


def corpora(scale: str) -> dict[str, Corpus]:
    """The corpora of a scale by name: main, light (same shards, short rows) and the three of the mixture."""
    sizes = SCALES[scale]
    made = {name: Corpus(name, *sizes[name]) for name in ("main", "light")}
    shards, rows, width = sizes["mixture"]
    for number in range(len(MIXTURE)):
        name = f"mixture{number}"
        made[name] = Corpus(name, shards, rows, width, first=number * shards * rows)
    return made
