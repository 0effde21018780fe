"""A plan for people: facts, and tables that fit a terminal of 100 columns."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.plan.duration import in_words
from jobs.plan.published import Comparison

WIDTH = 100
GIB = 2**30


def as_text(facts: dict[str, Any], rows: int, width: int | None) -> str:
    """The plan with the first `rows` layouts; `width` is the terminal's, None when there is none (no colours then)."""
    parts: list[RenderableType] = [_facts(_model(facts)), Text()]
    parts += [_memory(facts), Text(), _time(facts), Text(), _layouts(facts, rows)]
    parts += [Text("t tensor, p pipeline, d data ranks, z ZeRO stage; GiB of the fullest rank", style="dim"), Text()]
    parts += [_facts(_run(facts)), Text(), _facts(_checkpoints(facts))]
    if "simulation" in facts:
        parts += [Text(), _simulated(facts["simulation"])]
    return render(parts, width)


def render(parts: Sequence[RenderableType], width: int | None) -> str:
    """The parts one below the other."""
    console = Console(
        file=io.StringIO(),
        width=min(width or WIDTH, 140),
        force_terminal=width is not None,
        color_system="standard" if width is not None else None,
        highlight=False,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n")).strip("\n")


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal behind a stream, None when there is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def published_table(found: Sequence[Comparison], width: int | None) -> str:
    """Published runs, predictions and errors, with the sources below."""
    sources = list(dict.fromkeys(one.source for one in found))
    table = _table("run", "devices", "t x p x d", "tokens", "published", "predicted", "error", "")
    for one in found:
        layout = one.layout
        table.add_row(
            f"{one.name} [{sources.index(one.source) + 1}]".replace("[", r"\["),
            f"{layout.ranks:,} {one.device}",
            f"{layout.tensor} x {layout.pipeline} x {layout.data}",
            f"{one.tokens:,}",
            f"{one.published:.0f}",
            f"{one.predicted:.0f}",
            f"{one.error:+.1%}",
            "held out" if one.held_out else "",
        )
    errors = [abs(one.error) for one in found]
    kept = [abs(one.error) for one in found if one.held_out]
    lines = [
        "TFLOP/s per device. The constants were chosen by the runs that are not held out.",
        f"Mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}; of the {len(kept)} held out "
        f"{sum(kept) / len(kept):.1%} and {max(kept):.1%}.",
        *(f"[{number}] {source}" for number, source in enumerate(sources, 1)),
    ]
    return render([table, Text(), *(Text(line) for line in lines)], width)


def _facts(pairs: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, min_width=12)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, Text(value))
    return grid


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left or not column else "right", no_wrap=bool(column))
    return table


def _model(facts: dict[str, Any]) -> list[tuple[str, str]]:
    parts, flops, device = facts["parameters"], facts["flops"], facts["device"]
    shares = ", ".join(f"{name} {_count(count)}" for name, count in parts.items() if name != "total")
    idle = f", {facts['idle_ranks']} of them idle" if facts["idle_ranks"] else ""
    pairs = [
        ("parameters", f"{_count(parts['total'])}: {shares}"),
        (
            "FLOPs",
            f"{_count(flops['per_token'])} per token (6 per weight in matrices, 12 d T per layer of attention): "
            f"matrices {flops['matrices_share']:.1%}, attention {flops['attention_share']:.1%}, "
            f"head {flops['head_share']:.1%}",
        ),
        ("devices", f"{facts['ranks']:,} {device['name']}, {facts['gpus_per_node']} per node{idle}"),
    ]
    if facts["assumed"]:
        assumed = ", ".join(f"{name}={value}" for name, value in facts["assumed"].items())
        pairs.append(("assumed", f"{assumed}: not what Telar does"))
    chosen, subject = facts["chosen"], facts["subject"]
    pairs.append(("configured", f"{_name(chosen)}: {chosen['problem'] or 'fits'}"))
    if subject["why"] == "fastest":
        how = subject["settings"]
        pairs.append(("fastest", f"{_name(subject)}: described below; {how}"))
    elif subject["why"] == "smallest":
        pairs.append(("smallest", f"{_name(subject)}: no layout fits, this one is nearest to it and described below"))
    elif chosen["problem"]:
        pairs.append(("", "there is no legal layout; the configured one is described below all the same"))
    return pairs


def _memory(facts: dict[str, Any]) -> Table:
    table = _table("memory per rank, GiB", "parameters", "gradients", "optimizer", "activations", "workspace", "total")
    rows = {"configured": facts["chosen"]}
    if facts["subject"]["why"] != "chosen":
        rows[facts["subject"]["why"]] = facts["subject"]
    for name, one in rows.items():
        memory = one["memory_bytes"]
        style = "red" if one["problem"] else ""
        table.add_row(f"{name} ({_short(one)})", *(_gib(size) for size in memory.values()), style=style)
    return table


def _time(facts: dict[str, Any]) -> Table:
    subject = facts["subject"]
    sent = {flow["name"]: flow for flow in subject["communication"]}
    table = _table("one step", "time", "share", "sent by a rank", "")
    notes = {
        "matrices": "matrix multiplications of the layers",
        "attention": "scores and mixing",
        "memory": "norms, activations, residuals",
        "launch": "small kernels wait for the host",
        "head": "output projection and loss",
        "optimizer": "Adam on a rank's share",
        "tensor": "all-reduces between tensor ranks",
        "pipeline": "activations between stages",
        "gradients": "between replicas",
        "parameters": "gathered from replicas",
        "bubble": "stages wait for work",
        "stragglers": "all wait for the slowest rank",
    }
    seconds = subject["step_seconds"]
    for name, value in seconds.items():
        if name == "total" or value <= 0:
            continue
        flow = sent.get(name)
        link = f"{_bytes(flow['bytes_per_rank'])}, {flow['link']}" if flow else ""
        table.add_row(name, in_words(value), f"{value / seconds['total']:.1%}", link, notes[name])
    table.add_row("total", in_words(seconds["total"]), "", "", "", style="bold")
    return table


def _layouts(facts: dict[str, Any], rows: int) -> Table:
    layouts = facts["layouts"]
    fits = sum(one["problem"] is None for one in layouts)
    # Some of those that do not fit are shown too, so that a reader sees why.
    shown = layouts[:rows]
    if fits >= rows > 3 and fits < len(layouts):
        shown = [*layouts[: rows - 2], *layouts[fits : fits + 2]]
    title = f"{len(layouts)} legal layouts, {fits} fit"
    table = _table(title, "tokens/s", "MFU", "step", "bubble", "GiB", "")
    for one in shown:
        table.add_row(
            _short(one),
            f"{one['tokens_per_second']:,.0f}",
            f"{one['mfu']:.1%}",
            in_words(one["step_seconds"]["total"]),
            f"{one['bubble_share']:.1%}",
            _gib(one["memory_bytes"]["total"]),
            "" if one["problem"] is None else f"no: {_largest(one)}",
            style="dim" if one["problem"] else "",
        )
    return table


def _run(facts: dict[str, Any]) -> list[tuple[str, str]]:
    run, data = facts["run"], facts["data"]
    return [
        (
            "speed",
            f"{run['tokens_per_second']:,.0f} tokens/s, {run['tokens_per_second_per_gpu']:,.0f} per device, "
            f"{run['tflops_per_gpu']:.3g} TFLOP/s per device, MFU {run['mfu']:.1%}",
        ),
        (
            "run",
            f"{run['steps']:,} steps, {_count(run['tokens'])} tokens: {in_words(run['seconds'])}, "
            f"{_count(run['gpu_hours'])} device-hours, {_count(run['energy_kwh'])} kWh at the boards' rated power",
        ),
        (
            "data",
            f"{data['samples']:,} samples, {data['shards']:,} shards, {_bytes(data['bytes'])} "
            f"({data['bytes_per_token']} bytes per token); each node reads "
            f"{_bytes(data['node_bytes_per_second'])}/s",
        ),
    ]


def _checkpoints(facts: dict[str, Any]) -> list[tuple[str, str]]:
    found = facts["checkpoints"]
    origin = "given" if found["mtbf_given"] else "at the rate of Llama 3's run; --mtbf changes it"
    return [
        (
            "checkpoint",
            f"{_bytes(found['bytes'])}, {_bytes(found['bytes_per_node'])} per node: training stands still for "
            f"{in_words(found['stall_seconds'])}, committed after {in_words(found['upload_seconds'])}",
        ),
        (
            "failures",
            f"one every {in_words(found['mtbf_seconds'])} ({origin}); going on takes "
            f"{in_words(found['restart_seconds'])}",
        ),
        (
            "goodput",
            f"{found['goodput']:.2%} with checkpoint.every_steps={found['interval_steps']} "
            f"({in_words(found['interval_seconds'])}); {found['best_goodput']:.2%} with "
            f"{found['best_interval_steps']} ({in_words(found['best_interval_seconds'])}, Young and Daly)",
        ),
    ]


def _simulated(runs: dict[str, dict[str, Any]]) -> Table:
    horizon = in_words(runs["best"]["horizon_seconds"])
    table = _table(f"simulated {horizon}", "every", "failures", "lost", "restarts", "waiting", "copies", "goodput", "")
    for name, one in runs.items():
        shares = (
            f"{one[f'{key}_seconds'] / one['horizon_seconds']:.2%}"
            for key in ("lost", "restarting", "waiting", "stalled")
        )
        table.add_row(
            f"{name} interval",
            in_words(one["interval_seconds"]),
            f"{one['failures']:,}",
            *shares,
            f"{one['goodput']:.2%}",
            f"({one['expected_goodput']:.2%})",
        )
    table.columns[-1].header = "(formula)"
    return table


def _largest(one: dict[str, Any]) -> str:
    """What takes most memory."""
    parts = {name: size for name, size in one["memory_bytes"].items() if name != "total"}
    most = max(parts, key=parts.__getitem__)
    return f"{most} {_gib(parts[most])}"


def _name(one: dict[str, Any]) -> str:
    return f"tensor {one['tensor']} x pipeline {one['pipeline']} x data {one['data']}, ZeRO-{one['zero']}"


def _short(one: dict[str, Any]) -> str:
    return f"t{one['tensor']} p{one['pipeline']} d{one['data']} z{one['zero']}"


def _count(number: float) -> str:
    return _scaled(number, ("", " thousand", " million", " billion", " trillion"), " * 10^15")


def _bytes(number: float) -> str:
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"), " PB")


def _scaled(number: float, units: Sequence[str], last: str) -> str:
    for unit in units:
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}{last}"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 1 else f"{gib:.2g}"
