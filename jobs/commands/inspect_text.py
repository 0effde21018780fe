"""What `telar inspect` found, for people: tables, bars and decoded text that fit the terminal; plain without one."""

from __future__ import annotations

import io
import shutil
import unicodedata
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

INDENT = 2
BLOCK, HASH = "\u2588", "#"


def as_text(result: dict[str, Any], width: int | None, unicode_bars: bool = True) -> str:
    """Text of what `inspecting.inspect` gave; `width` is the terminal's in characters, None when there is none.

    Without a terminal there are no colours, and decoded text is not wrapped.
    """
    styled = width is not None
    # Not a terminal: wide enough that no table is wrapped; lines are as long as their content.
    console = Console(
        file=io.StringIO(),
        width=width or 200,
        force_terminal=styled,
        color_system="standard" if styled else None,
        highlight=False,
        legacy_windows=False,
    )
    bar = (BLOCK if unicode_bars else HASH, min(width or 100, 160))
    parts = _samples(result, styled) if "samples" in result else _description(result, *bar)
    for part in parts:
        console.print(part, soft_wrap=not styled and isinstance(part, Text))
    return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n")).strip("\n")


def on(stream: TextIO, result: dict[str, Any]) -> str:
    """`as_text` for what `stream` is: a terminal of some width, or none."""
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    return as_text(result, width, unicode_bars=(stream.encoding or "").lower().startswith("utf"))


def _description(result: dict[str, Any], bar: str, width: int) -> list[RenderableType]:
    corpora, mixture = result["corpora"], result["mixture"]
    parts: list[RenderableType] = [_facts(_data_facts(result)), Text(), _corpus_table(corpora), Text()]
    for number, segment in enumerate(mixture["segments"]):
        parts += [
            _mixture_title(result, segment),
            _mixture_table(mixture, segment, number == 0, result["note"]),
            Text(),
        ]
    for corpus in corpora:
        parts += [
            _lengths_title(corpus),
            Padding(_histogram(corpus["lengths"], bar, width - INDENT), (0, 0, 0, INDENT)),
        ]
        parts += [Padding(_counts(corpus), (0, 0, 0, INDENT)), Text()]
    return parts


def _facts(pairs: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, Text(value))
    return grid


def _data_facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    tokenizer = result["tokenizer"]
    special = tokenizer["special_tokens"]
    shown = " ".join(special[:8]) + (f" and {len(special) - 8:,} more" if len(special) > 8 else "")
    room = f"{result['target_capacity']:,} positions to a sample"
    if result["layout"] == "pairs":
        room = f"{result['source_capacity']:,} source and {result['target_capacity']:,} target positions to a sample"
    facts = [
        ("data", f"{result['storage']}/{result['folder']}"),
        ("layout", f"{result['layout']}, packing {result['packing']}, {room}"),
        ("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocabulary_size']:,} entries, digest {tokenizer['digest']}"),
        ("special", shown),
        ("order", _order(result["order"])),
    ]
    return [*facts, ("note", result["note"])] if result["note"] else facts


def _order(order: dict[str, Any]) -> str:
    buckets = f", length buckets of {order['bucket_batches']} batches" if order["bucket_batches"] else ""
    return (
        f"seed {order['seed']}, {order['lanes']} lanes, windows of {order['window_blocks']} blocks of "
        f"{order['block_rows']} samples{buckets}"
    )


def _table(*columns: str, gap: int = 2) -> Table:
    """A table without lines; the first column is text, the others are numbers."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    return table


def _corpus_table(corpora: list[dict[str, Any]]) -> Table:
    table = _table(
        "corpus", "shards", "samples", "pairs", "held out", "source tokens", "full", "target tokens", "full", gap=1
    )
    numbers = (
        "shards",
        "rows",
        "pairs",
        "records_held_out",
        "source_tokens",
        "source_fill",
        "target_tokens",
        "target_fill",
    )
    for corpus in corpora:
        table.add_row(Text(corpus["name"]), *(_cell(name, corpus[name]) for name in numbers))
    if len(corpora) > 1:
        sums = {name: sum(corpus[name] for corpus in corpora) for name in numbers if not name.endswith("fill")}
        table.add_row("all", *(short(sums[name]) if name in sums else "" for name in numbers), style="dim")
    return table


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if name.endswith("fill") else short(int(value))


def short(number: int) -> str:
    """A count in at most six characters: below 10,000 as it is, larger ones with three digits and a unit."""
    if number < 10_000:
        return f"{number:,}"
    value = float(number)
    for unit in "kMGTPE":
        value /= 1000
        for decimals, limit in ((2, 9.995), (1, 99.95), (0, 999.5)):
            if value < limit:
                return f"{value:.{decimals}f} {unit}"
    return f"{value:.0f} E"


def _mixture_title(result: dict[str, Any], segment: dict[str, Any]) -> Text:
    title = Text("mixture", style="bold")
    if segment["first_position"]:
        title.append(
            f" from position {segment['first_position']:,} (step {segment['from_step']:,.0f})", style="not bold"
        )
    exact = f", exact in every {segment['superblock']:,} positions"
    run = "" if result["note"] else f"; {result['positions']:,} positions in the run"
    return title.append(exact + run, style="not bold")


def _mixture_table(mixture: dict[str, Any], segment: dict[str, Any], with_epochs: bool, note: str) -> Table:
    epochs = with_epochs and not note
    table = _table("corpus", "weight", "slots", "share", *(["epochs in the run"] if epochs else []))
    for number, name in enumerate(mixture["corpora"]):
        cells = [f"{segment['weights'][number]:g}", f"{segment['slots'][number]:,}", f"{segment['shares'][number]:.2%}"]
        table.add_row(Text(name), *cells, *([f"{mixture['epochs'][number]:.3g}"] if epochs else []))
    return table


def _lengths_title(corpus: dict[str, Any]) -> Text:
    lengths = corpus["lengths"]
    title = Text(corpus["name"], style="bold").append(": tokens of a pair", style="not bold")
    if lengths["pairs"] < corpus["pairs"]:
        title.append(
            f" ({lengths['pairs']:,} of {corpus['pairs']:,} pairs looked at, in {lengths['shards']:,} of "
            f"{corpus['shards']:,} shards)",
            style="not bold",
        )
    return title


def _histogram(lengths: dict[str, Any], bar: str, width: int) -> Table:
    bins = lengths["bins"]
    sides = [side for side in ("source", "target") if lengths[side]["most"]]
    labels = [
        f"{each['least']:,}" if each["least"] == each["most"] else f"{each['least']:,}-{each['most']:,}"
        for each in bins
    ]
    number_width = max(len(short(each[side])) for each in bins for side in sides)
    room = (width - max(map(len, labels)) - 2) // len(sides) - number_width - 4
    most = max(each[side] for each in bins for side in sides)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    for _ in sides:
        table.add_column(justify="right", no_wrap=True)
        table.add_column(width=max(room, 1), no_wrap=True, style="cyan")
    table.add_row("", *(cell for side in sides for cell in ("", Text(side, style="bold default"))))
    used = [number for number, each in enumerate(bins) if any(each[side] for side in sides)]
    for number in range(used[0], used[-1] + 1):
        each = bins[number]
        cells = [cell for side in sides for cell in (short(each[side]), bar * _bar_length(each[side], most, room))]
        table.add_row(labels[number], *cells)
    medians = (f"median {lengths[side]['median']:,}, 90% up to {lengths[side]['nine_in_ten']:,}" for side in sides)
    table.add_row("", *(cell for text in medians for cell in ("", Text(text, style="dim", overflow="ellipsis"))))
    return table


def _bar_length(count: int, most: int, room: int) -> int:
    """In proportion, but never nothing where there is something."""
    return max(round(count / most * room), 1) if count else 0


def _counts(corpus: dict[str, Any]) -> Text:
    found = ", ".join(f"{name}: {number:,}" for name, number in corpus["counts"].items() if number)
    return Text(f"input: {found}", style="dim")


def _samples(result: dict[str, Any], styled: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [_facts([("order", _order(result["order"]))])]
    if result["note"]:
        parts.append(_facts([("note", result["note"])]))
    for sample in result["samples"]:
        parts += [Text(), _sample_title(result, sample)]
        if not sample["pairs"]:
            parts.append(Text("the shard is in quarantine: the sample is masked"))
        for number, pair in enumerate(sample["pairs"], 1):
            parts += _pair(number, pair, result["layout"], styled)
    return parts


def _sample_title(result: dict[str, Any], sample: dict[str, Any]) -> Text:
    title = Text(f"position {sample['position']:,}", style="bold")
    batch = result["global_batch_sequences"]
    place = ""
    if not result["note"]:
        place = f" (step {sample['position'] // batch + 1:,})"
        if sample["position"] >= result["positions"]:
            place = f" (after the run's end at {result['positions']:,})"
    if sample["order_position"] != sample["position"]:
        place += f", by length buckets sample {sample['order_position']:,} of the order"
    pairs = len(sample["pairs"])
    room = result["target_capacity"]
    used = sample["target_tokens"]
    if result["layout"] == "pairs":
        filling = (
            f"{sample['source_tokens']} of {result['source_capacity']} source and {used} of {room} target positions"
        )
    else:
        filling = f"{sample['source_tokens'] + used} of {room} positions"
    return title.append(
        f"{place}: corpus {sample['corpus']}, epoch {sample['epoch']}, row {sample['row']:,} (row "
        f"{sample['row_in_shard']:,} of {sample['shard']}), {pairs} {'pair' if pairs == 1 else 'pairs'} in {filling}",
        style="not bold",
    )


def _pair(number: int, pair: dict[str, Any], layout: str, styled: bool) -> list[RenderableType]:
    # A decoder reads the source without loss; an encoder's tokens have none to begin with.
    masked = "source, no loss" if layout == "sequence" else "source"
    rows = [
        (f"{number} {label}", _decoded(pair[side], style))
        for side, label, style in (("source", masked, "dim"), ("target", "target", ""))
        if pair[side]["ids"]
    ]
    if not pair["ended"]:
        rows[-1][1].append(" [goes on in another pair]", style="yellow")
    if styled:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="bold", justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, content in rows:
            grid.add_row(label, content)
        return [grid]
    lines: list[RenderableType] = []
    for label, content in rows:
        head, *rest = content.plain.split("\n")
        lines += [Text(f"{label:>17} | {head}"), *(Text(f"{'':>17} | {line}") for line in rest)]
    return lines


def _decoded(side: dict[str, Any], style: str) -> Text:
    text = Text(style=style)
    for content, is_special in side["parts"]:
        text.append(printable(content), style="magenta" if is_special else "")
    return text


def printable(text: str) -> str:
    """Control characters, which would change the terminal, spelled out; newlines and tabs stay."""
    return "".join(
        each
        if each in "\n\t" or unicodedata.category(each) not in ("Cc", "Cf") or each in "\u200c\u200d"
        else ascii(each)[1:-1]
        for each in text
    )
