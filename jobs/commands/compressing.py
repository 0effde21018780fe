"""`telar compress`: a run's model made smaller, on this machine, and the table of what that changed."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from jobs.commands.runs import RunPlace
from jobs.compression_table import HEAD, table_rows, task_head, task_rows


def compress_run(
    place: RunPlace,
    choice: dict[str, Any],
    step: int | None,
    name: str | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Make the compressed run and measure it; `choice` are the fields of `jobs.compress.Compression`.

    Returns url and run of what was made and the content of its compression.json. Raises ConfigError.
    """
    from jobs.compress import Compression, compress

    record = compress(place.storage, place.name, place.config(), Compression(**choice), step, name, report)
    return {"run": record["run"], "url": f"{place.storage.url}/{record['run']}", **record}


def on(stream: TextIO, result: dict[str, Any]) -> str:
    """The tables as text for what `stream` is: a terminal of some width, or none."""
    width = shutil.get_terminal_size().columns if stream.isatty() else 200
    console = Console(file=io.StringIO(), width=width, force_terminal=stream.isatty(), highlight=False)
    for head, rows in ((HEAD, table_rows(result)), (task_head(result), task_rows(result))):
        if not rows:
            continue
        table = Table(box=None, header_style="bold")
        for number, title in enumerate(head):
            table.add_column(title, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"run {result['url']}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n")).strip("\n")
