"""Two evaluated checkpoints on the same rows: the difference of each headline with a paired bootstrap interval.

Rows are read from the slices that the evaluations left, so nothing is answered again. Each round draws records once
for both sides (Efron and Tibshirani 1993, section 16.4, with records as the unit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.storage import Storage
from configs.errors import ConfigError
from configs.schema import RunConfig
from data.manifest import Manifest
from jobs.evaluate import digest_of, plan
from jobs.intervals import difference_interval
from jobs.loading import choose_checkpoints
from jobs.results import ERROR_RATE_LIMIT, Cell
from jobs.slices import decoding_of, read_rows
from jobs.tasks.base import Measure
from jobs.tasks.from_data import DataTask
from jobs.tasks.rows import digest_of_rows


@dataclass(frozen=True)
class Side:
    """One checkpoint with the cells of its evaluation; a cell that misses slices has a problem and no rows."""

    title: str
    step: int
    checkpoint_digest: str
    data_digest: str
    decoding: str
    cells: list[Cell]

    def of(self, key: tuple[str, str]) -> Cell | None:
        """The cell of (corpus, task), None where this side has none."""
        return next((cell for cell in self.cells if _key(cell) == key), None)

    def data_of(self, cell: Cell) -> str:
        """Digest of the data that a cell's records come from: the prepared data, or the rows of a task as data."""
        if isinstance(cell.task, DataTask):
            return digest_of_rows([example.record for example in cell.examples])
        return self.data_digest

    def as_dict(self) -> dict[str, Any]:
        """For JSON; cells are left out."""
        return {
            "checkpoint": self.title,
            "step": self.step,
            "checkpoint_digest": self.checkpoint_digest,
            "data_digest": self.data_digest,
            "decoding": self.decoding,
        }


def read_side(config: RunConfig, storage: Storage, run: str, manifest: Manifest, step: int | None = None) -> Side:
    """The rows that evaluating the checkpoint of `step` (default: the latest) under `config` has left.

    Raises ConfigError when there is no such checkpoint, StorageError when a slice is damaged.
    """
    committed = choose_checkpoints(storage, run, step, config.evaluate.average_checkpoints)
    folder, digest = storage.child(run), digest_of(committed)
    cells = plan(config, storage, manifest, digest)
    for cell in cells:
        found = [read_rows(folder, piece) for piece in cell.slices]
        missing = sum(rows is None for rows in found)
        if missing:
            cell.problems.append(f"{missing} of {len(found)} slices of {run}, step {committed[-1].step}, not answered")
        else:
            cell.rows.extend(row for rows in found for row in rows or ())
    title = f"{run}, step {committed[-1].step}"
    return Side(title, committed[-1].step, digest, manifest.digest, decoding_of(config.evaluate), cells)


def compare(first: Side, second: Side, only: Sequence[str], rounds: int, seed: int) -> list[dict[str, Any]]:
    """One JSON object per cell of either side, in the first side's order: status `ok` with figures, else why not.

    `only` names corpora or tasks as data (empty: all of them). `difference` is second minus first. Raises ConfigError
    when `only` names what neither side has, and, naming each cell, when the sides read other data, define the task
    otherwise or chose other rows.
    """
    keys = list(dict.fromkeys(_key(cell) for side in (first, second) for cell in side.cells))
    unknown = [name for name in only if name not in {corpus for corpus, _ in keys}]
    if unknown:
        raise ConfigError(
            f"--only: nothing is called {', '.join(unknown)}; there are {', '.join(dict.fromkeys(c for c, _ in keys))}"
        )
    keys = [key for key in keys if not only or key[0] in only]
    shared = [(key, first.of(key), second.of(key)) for key in keys]
    problems = [
        f"{task} of {corpus}: {problem}"
        for (corpus, task), ours, theirs in shared
        if ours and theirs and (problem := _mismatch(first, ours, second, theirs))
    ]
    if problems:
        raise ConfigError(
            f"{first.title} and {second.title} were not evaluated on the same rows; choose other cells with --only, or "
            "evaluate both on the same data\n  " + "\n  ".join(problems)
        )
    found = []
    for (corpus, task), ours, theirs in shared:
        if ours is None or theirs is None:
            result = {"status": "alone", "detail": f"only {(first if ours else second).title} has it"}
        else:
            result = _compared(ours, theirs, rounds, seed)
        found.append({"corpus": corpus, "task": task, **result})
    return found


def _key(cell: Cell) -> tuple[str, str]:
    return cell.corpus, cell.task.name


def _mismatch(first: Side, ours: Cell, second: Side, theirs: Cell) -> str | None:
    """Why the rows of two cells cannot be paired, None where they can or where a side has none, which is said later."""
    if any(cell.problems and not cell.examples for cell in (ours, theirs)):
        return None
    digests = first.data_of(ours), second.data_of(theirs)
    if digests[0] != digests[1]:
        return f"data {digests[0]} of {first.title}, {digests[1]} of {second.title}"
    if _definition(ours) != _definition(theirs):
        return "the task is defined otherwise"
    if ours.task.version != theirs.task.version:
        return f"versions {ours.task.version} and {theirs.task.version} of the task"
    rows = [[(e.record.index, e.record.source, e.record.target) for e in cell.examples] for cell in (ours, theirs)]
    if rows[0] != rows[1]:
        both = len(set(rows[0]) & set(rows[1]))
        return f"{len(rows[0])} and {len(rows[1])} rows, {both} of them the same (run.seed or a limit differs)"
    return None


def _definition(cell: Cell) -> dict[str, Any] | None:
    """What a task as data asks and scores; where its files lie is left out, their rows are compared by content."""
    return cell.task.definition.model_dump(exclude={"path"}) if isinstance(cell.task, DataTask) else None


def _compared(ours: Cell, theirs: Cell, rounds: int, seed: int) -> dict[str, Any]:
    problems = [problem for cell in (ours, theirs) for problem in cell.problems]
    if problems:
        return {"status": "missing", "detail": "; ".join(problems)}
    if not ours.examples:
        return {"status": "empty", "detail": "no rows"}
    if ours.task.headline is None:
        return {"status": "no headline", "detail": "its figures are no ratios of sums over rows"}
    for cell in (ours, theirs):
        failed = sum(row.error is not None for row in cell.rows)
        if failed > ERROR_RATE_LIMIT * len(cell.rows):
            return {"status": "failed", "detail": f"{failed} of {len(cell.rows)} rows of one side failed"}
    answered = [
        number
        for number, rows in enumerate(zip(ours.rows, theirs.rows, strict=True))
        if all(row.error is None for row in rows)
    ]
    sides = [_measure(cell, answered) for cell in (ours, theirs)]
    if any(side.denominators.sum() == 0 for side in sides):
        return {"status": "empty", "detail": f"nothing to divide {sides[0].label} by"}
    pair = [(side.numerators, side.denominators) for side in sides]
    found = difference_interval(pair[1], pair[0], True, rounds, seed)
    values = [float(top.sum() / bottom.sum()) for top, bottom in pair]
    differs = found.low > 0 or found.high < 0
    better = None
    if differs and sides[0].higher_is_better is not None:
        better = "second" if (found.value > 0) == sides[0].higher_is_better else "first"
    return {
        "status": "ok",
        "detail": None,
        "metric": sides[0].name,
        "label": sides[0].label,
        "unit": sides[0].unit,
        "higher_is_better": sides[0].higher_is_better,
        "first": values[0],
        "second": values[1],
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "left_out": len(ours.rows) - found.n,
        "differs": differs,
        "better": better,
    }


def _measure(cell: Cell, numbers: Sequence[int]) -> Measure:
    """The headline of the rows of these numbers."""
    return cell.task.measure([cell.examples[i] for i in numbers], [cell.rows[i] for i in numbers])


def lines(first: str, second: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    """The comparison for the terminal: what A and B are, then one line per cell."""
    compared = [cell for cell in cells if cell["status"] == "ok"]
    names = [f"{cell['task']} of {cell['corpus']}" for cell in cells]
    wide = max([4, *map(len, names)])
    wide_metric = max([6, *(len(cell["metric"]) for cell in compared)])
    text = [f"A  {first}", f"B  {second}"]
    if compared:
        text.append(f"{'cell':<{wide}} {'figure':<{wide_metric}} {'A':>8} {'B':>8}   B - A [95%, paired]")
    for name, cell in zip(names, cells, strict=True):
        if cell["status"] != "ok":
            text.append(f"{name:<{wide}} {cell['status']}: {cell['detail']}")
            continue
        verdict = {"first": "A is better", "second": "B is better", None: "they differ"}[cell["better"]]
        text.append(
            f"{name:<{wide}} {cell['metric']:<{wide_metric}} {cell['first']:8.3f} {cell['second']:8.3f}   "
            f"{cell['difference']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}] {cell['unit']}, n {cell['n']}"
            + (f", {cell['left_out']} left out" if cell["left_out"] else "")
            + f"; {verdict if cell['differs'] else 'no difference shown'}"
        )
    return text
