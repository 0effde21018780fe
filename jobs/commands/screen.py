"""One screen of `telar watch`: from what is known of a run to lines of a terminal, nothing else."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.ledger import duration
from jobs.run_view import RunView, first_line

COLOURS = {"finished": "green", "training": "green", "failed": "red", "stopped": "yellow", "silent": "red"}
LEAST_WIDTH = 40
# Rows besides the events: progress, curve, two lines of figures, heading, frame, links.
FIXED_ROWS = 13


def screen(shown: RunView, width: int, height: int) -> RenderableType:
    """The run in at most `height` rows of `width` columns; the oldest events go first where there is no room."""
    inner = max(LEAST_WIDTH, width - 4)
    parts: list[RenderableType] = []
    if shown.steps:
        parts.append(_progress(shown, inner))
    losses = [record["loss"] for record in shown.records]
    if losses:
        parts.append(_curve(losses, inner))
    parts += [Text(""), _figures(shown)]
    if shown.message:
        parts.append(Text(first_line(shown.message), style="yellow", overflow="ellipsis", no_wrap=True))
    links = [("dashboard", shown.dashboard_url), ("status page", shown.status_page_url)]
    for name, url in links:
        if url and not shown.is_over:
            parts.append(Text(f"{name:<12}{url}", style="dim", overflow="ellipsis", no_wrap=True))
    room = max(1, height - FIXED_ROWS - 2 * bool(shown.message))
    if shown.events:
        parts.append(Text(""))
        parts += [_event(event.unix_seconds, event.text, event.is_trouble) for event in shown.events[-room:]]
    return Panel(Group(*parts), title=_title(shown), title_align="left", border_style="dim", width=inner + 4)


def _title(shown: RunView) -> Text:
    title = Text.assemble((f" {shown.run} ", "bold"), (f" {shown.state} ", COLOURS.get(shown.state, "cyan")))
    if shown.silent_seconds is not None:
        title.append(f"for {duration(shown.silent_seconds)} ", style="red")
    elif shown.stage and not shown.is_over:
        title.append(f"stage {shown.stage} ", style="dim")
    return title


def _progress(shown: RunView, width: int) -> RenderableType:
    words = f"step {shown.step:,}/{shown.steps:,}  {shown.step / shown.steps:.0%}"
    words += f"  eta {duration(shown.eta_seconds)}" if shown.eta_seconds is not None else ""
    words += f"  after {duration(shown.running_seconds)}" if shown.running_seconds >= 1 else ""
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(no_wrap=True)
    row.add_column()
    row.add_row(words, ProgressBar(shown.steps, shown.step, width=max(8, width - len(words) - 2)))
    return row


def _curve(losses: Sequence[float], width: int) -> Text:
    low, high, now = min(losses), max(losses), losses[-1]
    words = f"loss {now:.3f}  "
    ends = f"  {low:.2f} to {high:.2f}"
    return Text.assemble(
        words, (sparkline(losses, max(8, width - len(words) - len(ends))), "cyan"), (ends, "dim"), no_wrap=True
    )


def _figures(shown: RunView) -> Table:
    """Names and values in two pairs of columns."""
    figures = [
        ("tokens", f"{shown.tokens:,}"),
        ("tokens/s", f"{shown.tokens_per_second:,.0f}" if shown.tokens_per_second else "-"),
        ("step time", f"{shown.step_seconds:.3f} s" if shown.step_seconds is not None else "-"),
        ("data wait", f"{shown.data_wait_share:.1%}" if shown.data_wait_share is not None else "-"),
        ("world size", f"{shown.world_size}"),
        ("slowest rank", shown.slowest_rank or "-"),
        ("attempts", f"{len(shown.attempts)}" + (f" ({shown.failures} failed)" if shown.failures else "")),
        ("last commit", _last_commit(shown)),
    ]
    table = Table.grid(padding=(0, 3, 0, 0))
    for style in ("dim", "", "dim", ""):
        table.add_column(style=style, no_wrap=True)
    for left, right in zip(figures[::2], figures[1::2], strict=True):
        table.add_row(*left, *right)
    return table


def _last_commit(shown: RunView) -> str:
    if shown.last_commit_step is None:
        return "none yet"
    age = "" if shown.last_commit_age_seconds is None or shown.is_over else duration(shown.last_commit_age_seconds)
    return f"step {shown.last_commit_step:,}" + (f", {age} ago" if age else "")


def _event(unix_seconds: float, text: str, is_trouble: bool) -> Text:
    line = Text(time.strftime("%H:%M:%S  ", time.gmtime(unix_seconds)), style="dim", overflow="ellipsis", no_wrap=True)
    line.append(text, style="red" if is_trouble else "not dim")
    return line


def sparkline(values: Sequence[float], width: int) -> str:
    """A row of at most `width` block characters for a series, each the mean of its share of the values."""
    if not values or width < 1:
        return ""
    cells = min(width, len(values))
    edges = [index * len(values) // cells for index in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[int((mean - low) / scale * 7)] for mean in means)
