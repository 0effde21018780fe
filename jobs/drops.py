"""What a score loses in another domain: the first figure of a task against that of the task or corpus it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import ConfigError
from configs.schema import RunConfig
from jobs.intervals import difference_interval
from jobs.results import Cell
from jobs.tasks.base import Metric
from jobs.tasks.from_data import DataTask, paired
from jobs.tasks.rows import where


def check_comparisons(cells: Sequence[Cell]) -> None:
    """Raise ConfigError for a task whose `compare_with` names no cell that has the same first figure."""
    for cell in cells:
        if _wanted(cell) and in_domain_of(cell, cells) is None:
            found = [f"{other.corpus} ({other.task.headline})" for other in cells if other.task.headline]
            raise ConfigError(
                f"{where(cell.task.definition, 'compare_with')}: no {_wanted(cell)!r} with {cell.task.headline}; there "
                f"are {', '.join(found)}"
            )


def in_domain_of(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell that a task's drop is counted from, None where none fits."""
    fitting = (c for c in cells if c.corpus == _wanted(cell) and _judged(c) == _judged(cell))
    return next(fitting, None)


def add_drops(cells: Sequence[Cell], results: Sequence[dict[str, Any]], config: RunConfig) -> None:
    """Add the metric `drop` to the result of each cell whose task compares, if both cells have figures."""
    of = {id(cell): result for cell, result in zip(cells, results, strict=True)}
    for cell in cells:
        other = in_domain_of(cell, cells) if _wanted(cell) else None
        if other is not None and of[id(cell)]["status"] == of[id(other)]["status"] == "ok":
            metric = drop(cell, other, config)
            if metric is not None:
                of[id(cell)]["metrics"].append(metric.as_dict())


def drop(cell: Cell, other: Cell, config: RunConfig) -> Metric | None:
    """How much worse `cell` is than `other`, positive when worse, with an interval.

    With `pair_by` rows that share a key are drawn together and others left out (None when no row is shared); both
    sides are then tasks as data. Without it each side is resampled by itself.
    """
    sides = []
    for each in (other, cell):
        examples, rows = (list(part) for part in zip(*each.answered(), strict=True))
        sides.append((each.task, examples, each.task.measure(examples, rows)))
    (in_task, in_examples, inside), (task, examples, outside) = sides
    pairs = bool(task.definition.pair_by) and isinstance(in_task, DataTask) and bool(in_task.definition.pair_by)
    if pairs:
        keys = [in_task.keys("pair_by", in_examples), task.keys("pair_by", examples)]
        chosen = paired(*keys, np.arange(len(keys[0])), np.arange(len(keys[1])))
        if not chosen[0].size:
            return None
        inside, outside = inside.of(chosen[0]), outside.of(chosen[1])
    # Positive is worse, whichever way the figure goes.
    first, second = (inside, outside) if inside.higher_is_better else (outside, inside)
    found = difference_interval(
        (first.numerators, first.denominators),
        (second.numerators, second.denominators),
        pairs,
        config.evaluate.bootstrap_rounds,
        config.run.seed,
    )
    how = "paired" if pairs else "unpaired"
    label = f"{outside.label} lost against {other.corpus} ({how})"
    return Metric("drop", label, found.value, found.low, found.high, found.n, outside.unit, False)


def _judged(cell: Cell) -> tuple[str | None, bool]:
    """What two first figures must share: SQuAD's exact match, after its normalisation, is another than that of texts
    as they are.
    """
    verbatim = isinstance(cell.task, DataTask) and cell.task.definition.metric == "exact_match"
    return cell.task.headline, verbatim


def _wanted(cell: Cell) -> str | None:
    return cell.task.definition.compare_with if isinstance(cell.task, DataTask) else None
