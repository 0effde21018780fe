"""From answered slices to results.json: cells, what failed or is missing, samples, and lines for the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from configs.schema import RunConfig
from jobs.energy import JOULES_PER_KWH, Energy
from jobs.harness_tasks import key_of
from jobs.slices import Slice
from jobs.tasks.base import Example, Metric, Row, Task, TrainingFacts
from jobs.tasks.from_data import DataTask
from jobs.tasks.likelihood import likelihood_metrics
from jobs.tasks.registry import TASKS
from jobs.tasks.rows import data_version

ERROR_RATE_LIMIT = 0.05
OVERALL = "all corpora"
FORMAT_VERSION = 1
SAMPLE_CHARACTERS = 4000


@dataclass
class Cell:
    """One task on one corpus: its slices, and the rows that came back for them."""

    corpus: str
    task: Task
    examples: list[Example]
    slices: list[Slice]
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    energy: Energy | None = None

    @property
    def title(self) -> str:
        """`task of corpus`, for messages."""
        return f"{self.task.name} of {self.corpus}"

    def note(self, energy: Energy | None) -> None:
        """Add what one more slice took."""
        if energy is not None:
            self.energy = energy if self.energy is None else self.energy + energy

    def answered(self) -> list[tuple[Example, Row]]:
        """Examples with their rows, those with an error left out."""
        return [(e, r) for e, r in zip(self.examples, self.rows, strict=True) if r.error is None]


def inputs_digest(config: RunConfig, checkpoint_digest: str, data_digest: str) -> str:
    """Digest of everything that results depend on; the number of evaluators is left out.

    Raises DataError or StorageError when the files of a task cannot be listed.
    """
    evaluate = config.evaluate.model_dump(mode="json", exclude={"workers"})
    files = {task.name: data_version(task) for task in config.evaluate.definitions}
    if evaluate["lm_eval"]:
        files |= {f"lm_eval:{entry}": key_of(entry, checkpoint_digest) for entry in config.evaluate.lm_eval}
    else:
        # Results of before this setting stay valid.
        del evaluate["lm_eval"]
    content = {
        "format": FORMAT_VERSION,
        "checkpoint": checkpoint_digest,
        "data": data_digest,
        "corpora": {corpus.name: corpus.task for corpus in config.data.corpora},
        "tasks": {name: task.version for name, task in TASKS.items()},
        "evaluate": evaluate,
        "definitions": DataTask.version,
        "files": files,
        "seed": config.run.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def cell_result(cell: Cell, facts: TrainingFacts, config: RunConfig) -> dict[str, Any]:
    """JSON object of one cell. Its status is ok, empty (no held-out records), missing (slices) or failed (records)."""
    found: dict[str, Any] = {
        "corpus": cell.corpus,
        "task": cell.task.name,
        "signature": cell.task.signature,
        "records": len(cell.examples),
        "failed_records": sum(row.error is not None for row in cell.rows),
        "status": "ok",
        "detail": None,
        "metrics": [],
    }
    if cell.problems:
        found.update(status="missing", detail="; ".join(dict.fromkeys(cell.problems)))
    elif not cell.examples:
        found.update(status="empty", detail="no held-out records; raise data.held_out_fraction or add files")
    elif found["failed_records"] > ERROR_RATE_LIMIT * len(cell.examples):
        first = next(row for row in cell.rows if row.error is not None)
        found.update(
            status="failed",
            detail=f"{found['failed_records']} of {len(cell.examples)} records failed (limit "
            f"{ERROR_RATE_LIMIT:.0%}); the first one, record {first.index}: {first.error}",
        )
    else:
        examples, rows = (list(part) for part in zip(*cell.answered(), strict=True))
        metrics = cell.task.score(examples, rows, facts, cell.corpus, config)
        found["metrics"] = [metric.as_dict() for metric in metrics]
    return found


def energy_results(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each cell whose slices say so the joules that answering took, also per record and per token.

    Tokens are those that were scored or written. A slice that an earlier evaluation answered counts with what it took
    then; `kind` is measured, estimated, or mixed where slices differ in it.
    """
    found = []
    for cell in cells:
        if not cell.rows or cell.energy is None:
            continue
        tokens = sum(_tokens(answer) for row in cell.rows for answer in row.answers)
        joules = cell.energy.joules
        found.append(
            {
                "corpus": cell.corpus,
                "task": cell.task.name,
                **asdict(cell.energy),
                "kwh": joules / JOULES_PER_KWH,
                "records": len(cell.rows),
                "tokens": tokens,
                "joules_per_record": joules / len(cell.rows),
                "joules_per_token": joules / tokens if tokens else None,
            }
        )
    return found


def _tokens(answer: dict[str, Any]) -> int:
    """Tokens of one answer: labels that were scored, of all candidates, or tokens that were written."""
    # An explanation counts the tokens that it explains.
    tokens = len(answer.get("labels") or answer.get("pieces") or ()) or answer.get("tokens", 0)
    return sum(tokens) if isinstance(tokens, list) else tokens


def overall_result(
    cells: Sequence[Cell], results: Sequence[dict[str, Any]], facts: TrainingFacts, config: RunConfig
) -> dict[str, Any] | None:
    """Likelihood over all corpora, token-weighted; None when a corpus has no likelihood to add or there is only one."""
    parts = [(c, r) for c, r in zip(cells, results, strict=True) if c.task.name == "likelihood"]
    if len(parts) < 2 or any(result["status"] != "ok" for _, result in parts):
        return None
    rows = [row for cell, _ in parts for _, row in cell.answered()]
    strata = np.array([number for number, (cell, _) in enumerate(parts) for _ in cell.answered()])
    metrics: list[Metric] = likelihood_metrics(rows, facts, config, strata)
    return {
        "corpus": OVERALL,
        "task": "likelihood",
        "signature": TASKS["likelihood"].signature,
        "records": len(rows),
        "failed_records": sum(result["failed_records"] for _, result in parts),
        "status": "ok",
        "detail": None,
        "metrics": [metric.as_dict() for metric in metrics],
    }


def samples(cells: Sequence[Cell], count: int) -> list[dict[str, str]]:
    """Source, reference and output of `count` records that the model wrote for.

    Cells take turns; each starts elsewhere in its rows and goes on in equal strides, so that the samples do not all
    come from one file.
    """
    queues = []
    for number, cell in enumerate(cells):
        written = [(e, r) for e, r in cell.answered() if cell.task.output(e, r) is not None] if cell.rows else []
        if written:
            stride = max(1, len(written) // max(count, 1))
            start = number * stride // len(cells)
            order = sorted(range(len(written)), key=lambda i: ((i - start) % stride, i))
            queues.append((cell, iter([written[i] for i in order])))
    chosen: list[dict[str, str]] = []
    while queues and len(chosen) < count:
        for entry in list(queues):
            cell, queue = entry
            found = next(queue, None)
            if found is None:
                queues.remove(entry)
            elif len(chosen) < count:
                example, row = found
                chosen.append(
                    {
                        "corpus": cell.corpus,
                        "task": cell.task.name,
                        "record": str(example.record.index),
                        "source": example.record.source[-SAMPLE_CHARACTERS:],
                        "reference": example.record.target[:SAMPLE_CHARACTERS],
                        "output": (cell.task.output(example, row) or "")[:SAMPLE_CHARACTERS],
                    }
                )
    return chosen


def table_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """One line per metric with interval, count and baselines, and one per cell without a figure."""
    lines = []
    widths = [max([len(cell[key]) for cell in results], default=0) for key in ("corpus", "task")]
    wide = max([len(metric["name"]) for cell in results for metric in cell["metrics"]], default=0)
    for cell in results:
        title = f"{cell['corpus']:<{widths[0]}} {cell['task']:<{widths[1]}}"
        if cell["status"] != "ok":
            lines.append(f"{title} {cell['status']}: {cell['detail']}")
        for metric in cell["metrics"]:
            beside = ", ".join(f"{base['name']} {base['value']:.3f}" for base in metric["baselines"])
            lines.append(
                f"{title} {metric['name']:<{wide}} {metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}] "
                f"{metric['unit']}, n {metric['n']}" + (f"; {beside}" if beside else "")
            )
    return lines
