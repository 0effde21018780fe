"""Captioned pictures that are drawn, not read: every combination of a shape's attributes once, so checks are exact.

`shapes://24` is all of them on 24 x 24 pixels: 6 shapes, 8 colours, 2 sizes, 9 places and 4 backgrounds.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from configs.errors import DataError

SCHEME = "shapes://"
SIDE = re.compile(r"shapes://([0-9]+)/?")
SMALLEST_SIDE, LARGEST_SIDE = 16, 256
# Changes whenever a picture or a caption does, so that prepared data are not taken for new ones.
VERSION = "1"

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 0.12, "large": 0.2}
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 30),
    "orange": (250, 130, 20),
    "purple": (140, 40, 170),
    "pink": (255, 150, 200),
    "brown": (110, 70, 35),
}
PLACES = {
    f"{row} {column}".replace("middle middle", "middle"): (x, y)
    for row, y in (("top", 0.24), ("middle", 0.5), ("bottom", 0.76))
    for column, x in (("left", 0.24), ("middle", 0.5), ("right", 0.76))
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "cyan": (150, 235, 240)}
ATTRIBUTES = ("shape", "colour", "size", "place", "background")
# Edges are smoothed by as many samples of a pixel, squared.
SAMPLES = 4


@dataclass(frozen=True)
class Drawing:
    """One picture by its attributes, each a key of the tables above."""

    shape: str
    colour: str
    size: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        """What the picture shows, in words: `a small red ring at the top left on white`."""
        return f"a {self.size} {self.colour} {self.shape} at the {self.place} on {self.background}"

    def pixels(self, side: int) -> np.ndarray:
        """The picture, uint8 `[side, side, 3]`."""
        share = _coverage(self.shape, self.size, self.place, side)
        mixed = share * np.array(COLOURS[self.colour]) + (1 - share) * np.array(BACKGROUNDS[self.background])
        return np.rint(mixed).astype(np.uint8)


def drawings() -> list[Drawing]:
    """All combinations in a fixed order."""
    return [Drawing(*each) for each in itertools.product(SHAPES, COLOURS, SIZES, PLACES, BACKGROUNDS)]


def side_of(path: str) -> int | None:
    """Pixels of a side that `shapes://SIDE` names, None for what is no such path."""
    found = SIDE.fullmatch(path)
    side = int(found[1]) if found else 0
    return side if SMALLEST_SIDE <= side <= LARGEST_SIDE else None


def shape_records(side: int, binary: Collection[str], origin: str) -> Iterator[dict[str, str | bytes]]:
    """One record per drawing: its attributes, `caption` and, where `binary` has it, `image`, the bytes of a PNG.

    Raises DataError, `origin` in front, when `binary` names another column.
    """
    if lacking := sorted(set(binary) - {"image"}):
        raise DataError(f"{origin} has no column {lacking[0]!r}, which a template names as an image; use `image`")
    for drawing in drawings():
        record: dict[str, str | bytes] = {name: getattr(drawing, name) for name in ATTRIBUTES}
        record["caption"] = drawing.caption
        if binary:
            content = io.BytesIO()
            Image.fromarray(drawing.pixels(side)).save(content, format="PNG")
            record["image"] = content.getvalue()
        yield record


@lru_cache(maxsize=512)
def _coverage(shape: str, size: str, place: str, side: int) -> np.ndarray:
    """How much of each pixel the shape takes, `[side, side, 1]` in [0, 1]."""
    x, y = PLACES[place]
    at = (np.arange(side * SAMPLES) + 0.5) / (side * SAMPLES)
    inside = _inside(shape, (at[None, :] - x) / SIZES[size], (at[:, None] - y) / SIZES[size])
    return inside.reshape(side, SAMPLES, side, SAMPLES).mean((1, 3))[..., None]


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points, relative to the middle and in units of the size, lie in the shape."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.9
    if shape == "triangle":
        return (y <= 0.9) & (y >= -0.9) & (np.abs(x) <= (y + 0.9) / 1.8)
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1.1
    if shape == "cross":
        return (np.maximum(np.abs(x), np.abs(y)) <= 1) & (np.minimum(np.abs(x), np.abs(y)) <= 0.33)
    return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3)
