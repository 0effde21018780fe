"""Pictures of captions, judged exactly: of all drawings that there are, the nearest one tells what a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from configs.schema import RunConfig
from data.drawn_shapes import ATTRIBUTES, Drawing, drawings
from data.held_out import HeldOut
from jobs.drawing import pixels_of
from jobs.tasks.base import Draw, Example, Measure, Metric, Row, TrainingFacts, metric_of


class TextToImage:
    """One picture per held-out caption of drawn shapes; every attribute of the nearest drawing is compared."""

    name = "text_to_image"
    headline = "attributes"
    version = 1
    signature = (
        "most probable image codes; nearest of all drawn shapes by squared error of pixels; chance: a caption at random"
    )

    def limit(self, config: RunConfig) -> int:
        """`evaluate.generate_records`."""
        return config.evaluate.generate_records

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """One picture per record."""
        return [Example(record, (Draw(record.source),)) for record in records]

    def score(
        self,
        examples: Sequence[Example],
        rows: Sequence[Row],
        facts: TrainingFacts,
        corpus: str,
        config: RunConfig,
    ) -> list[Metric]:
        """The share of attributes that are right, pictures with all of them right, and each attribute by itself."""
        return [metric_of(measure, config) for measure in attribute_measures(examples, shown(rows))]

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """The share of a picture's attributes that are right."""
        return attribute_measures(examples, shown(rows))[0]

    def output(self, example: Example, row: Row) -> str | None:
        """The caption of the nearest drawing."""
        return shown([row])[0].caption


def shown(rows: Sequence[Row]) -> list[Drawing]:
    """What the pictures of rows show."""
    return nearest(np.stack([pixels_of(row.answers[0]) for row in rows]))


def nearest(pictures: np.ndarray) -> list[Drawing]:
    """For each picture, uint8 `[pictures, side, side, 3]`, the drawing whose pixels differ least in squared error."""
    candidates, squares = _rendered(pictures.shape[1])
    wanted = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    return [_all()[number] for number in np.argmin(squares - 2 * wanted @ candidates.T, axis=1)]


def attribute_measures(examples: Sequence[Example], found: Sequence[Drawing]) -> list[Measure]:
    """Of each picture the share of attributes as captioned, whether all are, and each; beside a random caption."""
    records = [example.record.fields for example in examples]
    ones = np.ones(len(found))
    pairs = zip(found, records, strict=True)
    right = np.array([[float(getattr(shape, name) == record[name]) for name in ATTRIBUTES] for shape, record in pairs])
    values = {name: len({getattr(drawing, name) for drawing in _all()}) for name in ATTRIBUTES}
    chances = np.array([1 / values[name] for name in ATTRIBUTES])

    def measure(name: str, label: str, value: np.ndarray, chance: float) -> Measure:
        return Measure(name, label, "share", True, value, ones, {"chance": np.full(len(found), chance)})

    return [
        measure("attributes", "attributes that are as captioned", right.mean(1), float(chances.mean())),
        measure("all_attributes", "pictures with all attributes as captioned", right.prod(1), float(chances.prod())),
        *(
            measure(name, f"{name} as captioned", right[:, at], float(chances[at]))
            for at, name in enumerate(ATTRIBUTES)
        ),
    ]


@lru_cache(maxsize=1)
def _all() -> list[Drawing]:
    return drawings()


@lru_cache(maxsize=2)
def _rendered(side: int) -> tuple[np.ndarray, np.ndarray]:
    """All drawings in [0, 1], float32 `[drawings, side * side * 3]`, and the sum of squares of each."""
    pixels = np.stack([drawing.pixels(side).reshape(-1) for drawing in _all()]).astype(np.float32) / 255
    return pixels, np.square(pixels).sum(1)
