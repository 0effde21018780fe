"""Tables and sample cards of the report, as HTML; every text from a file is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from typing import Any

from jobs.report_plots import interval_strip


def evaluation_table(cells: Sequence[dict[str, Any]]) -> str:
    """Every metric of every cell with interval and count, its baselines below it, and the paired differences."""
    head = (
        '<table class="evaluation"><thead><tr><th>metric</th><th class="r">value</th><th class="r">95% interval</th>'
        '<th></th><th class="r">model minus baseline</th><th class="r">95% interval</th><th class="r">records</th>'
        '<th class="r">tokens</th></tr></thead>'
    )
    bodies = []
    for corpus, group in groupby(cells, key=lambda cell: cell["corpus"]):
        rows = [f'<tr class="corpus"><td colspan="8"><b>{escape(corpus)}</b></td></tr>']
        for cell in group:
            if cell["status"] != "ok":
                detail = f"{cell['task']}: {cell['status']}. {cell['detail']}"
                rows.append(f'<tr class="metric"><td colspan="8" class="bad">{escape(detail)}</td></tr>')
            for metric in cell["metrics"]:
                rows.extend(_metric_rows(metric, cell))
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return f'<div class="scroll">{head}{"".join(bodies)}</table></div>'


def _metric_rows(metric: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    higher = metric["higher_is_better"]
    better = "neither side is better" if higher is None else "higher is better" if higher else "lower is better"
    entries = [metric, *metric["baselines"]]
    left, right = min(entry["low"] for entry in entries), max(entry["high"] for entry in entries)
    failed = f' <span class="bad">({cell["failed_records"]} failed)</span>' if cell["failed_records"] else ""
    arrow = "" if higher is None else "&uarr;" if higher else "&darr;"
    tokens = f"{metric['tokens']:,}" if metric.get("tokens") else ""
    rows = [
        f'<tr class="metric"><td title="{escape(better)}. {escape(cell["signature"])}">{escape(metric["label"])} '
        f'<span class="unit">{escape(metric["unit"])} {arrow}</span></td>'
        f'<td class="r">{figure(metric["value"])}</td><td class="r light">{_range(metric["low"], metric["high"])}</td>'
        f'<td class="light">{interval_strip(metric["value"], metric["low"], metric["high"], left, right, "own")}</td>'
        f'<td></td><td></td><td class="r light">{metric["n"]:,}{failed}</td><td class="r light">{tokens}</td></tr>'
    ]
    for base in metric["baselines"]:
        low, high = base["difference_low"], base["difference_high"]
        verdict = ""
        if low > 0 or high < 0:
            # A bias is bad on either side.
            verdict = "good" if higher is not None and (low > 0) == higher else "bad"
        strip = interval_strip(base["value"], base["low"], base["high"], left, right, "base")
        rows.append(
            f'<tr class="base"><td>&ensp;{escape(base["name"])}</td><td class="r">{figure(base["value"])}</td>'
            f'<td class="r">{_range(base["low"], base["high"])}</td><td>{strip}</td>'
            f'<td class="r {verdict}">{figure(base["difference"], signed=True)}</td>'
            f'<td class="r">{_range(low, high, signed=True)}</td><td></td><td></td></tr>'
        )
    return rows


def sample_cards(samples: Sequence[dict[str, str]]) -> str:
    """Source, reference and output side by side, monospaced."""
    cards = []
    for number, sample in enumerate(samples, 1):
        # What a long source ends with is what the output goes on from, except in a summary.
        source_shown = "" if sample["task"] == "summary" else "end"
        parts = "".join(
            f'<div class="{name}"><h4>{name}</h4><pre class="{shown}"><code>{escape(sample[name]) or "&nbsp;"}'
            "</code></pre></div>"
            for name, shown in (("source", source_shown), ("reference", ""), ("output", ""))
        )
        cards.append(
            f'<article class="card sample"><p><b>{number}</b> &ensp;{escape(sample["corpus"])} '
            f'<span class="soft">held-out record {escape(str(sample.get("record", "")))}</span></p>'
            f'<div class="parts">{parts}</div></article>'
        )
    return "".join(cards)


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of texts; columns whose number is in `right` are aligned to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{_aligned(i in right)}>{escape(text)}</{tag}>" for i, text in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table class="plain">{top}<tbody>{body}</tbody></table></div>'


def _aligned(right: bool) -> str:
    return ' class="r"' if right else ""


def figure(value: float, signed: bool = False) -> str:
    """A figure with three decimals; a minus sign that is as wide as a plus."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "\u2212")


def _range(low: float, high: float, signed: bool = False) -> str:
    return f"{figure(low, signed)} &hellip; {figure(high, signed)}"


def when(unix_seconds: float | None) -> str:
    """A time as 2026-11-22 10:00:00 UTC."""
    if unix_seconds is None:
        return ""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def size(count: float | None) -> str:
    """Bytes as 1.25 GiB, 30.1 MiB, 512 KiB."""
    if count is None:
        return ""
    for limit, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.3g} {suffix}"
    return f"{count:.0f} B"


def span(seconds: float) -> str:
    """Seconds as 1h02m, 3m07s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{seconds:.2g}s" if seconds < 10 else f"{whole}s"
