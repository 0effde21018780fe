"""The tables of a compression: one row per model, each figure beside its ratio to the model before, and the tasks."""

from __future__ import annotations

from typing import Any

HEAD = ("model", "on disk", "in memory", "nats per token", "tokens/s, batch 1", "tokens/s, batch 32")


def table_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells as text of the rows in a run's compression.json, under HEAD."""
    first = record["rows"][0]
    return [_row(row, None if row is first else first) for row in record["rows"]]


def task_head(record: dict[str, Any]) -> tuple[str, ...]:
    """Head of the second table: a column for each corpus that is judged by more than its loss."""
    return "model", *(f"{each['corpus']}: {each['label']}" for each in _tasks(record["rows"][0]))


def task_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells as text under `task_head`: the figure and its 95% interval; empty without such corpora."""
    if not record["rows"][0]["tasks"]:
        return []
    found = []
    for row in record["rows"]:
        figures = {each["corpus"]: each for each in row["tasks"]}
        cells = (figures.get(each["corpus"]) for each in _tasks(record["rows"][0]))
        found.append((row["label"], *(_with_interval(cell) if cell else "no answers" for cell in cells)))
    return found


def _tasks(row: dict[str, Any]) -> list[dict[str, Any]]:
    # Records of earlier versions have none.
    return row.get("tasks", [])


def _with_interval(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _row(row: dict[str, Any], before: dict[str, Any] | None) -> tuple[str, ...]:
    def smaller(name: str) -> str:
        ratio = f" ({before[name] / row[name]:.2f}x smaller)" if before else ""
        return f"{row[name] / 2**20:,.2f} MiB{ratio}"

    def faster(batch: str) -> str:
        rate = row["tokens_per_second"][batch]["median"]
        ratio = f" ({rate / before['tokens_per_second'][batch]['median']:.2f}x)" if before else ""
        return f"{rate:,.0f}{ratio}"

    loss = "no records" if row["nll"] is None else f"{row['nll']:.4f}"
    if before and row["nll"] is not None:
        loss += f" ({row['nll'] / before['nll'] - 1:+.2%})"
    return row["label"], smaller("disk_bytes"), smaller("memory_bytes"), loss, faster("1"), faster("32")
