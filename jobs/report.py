"""RUN/report.html: one self-contained page about a run, made of the files in its directory and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from cluster.storage import Storage
from jobs.compression_table import HEAD, table_rows, task_head, task_rows
from jobs.report_attention import explanation_card
from jobs.report_data import RunFiles, course, read_run, smoothed
from jobs.report_plots import Mark, Series, line_chart, short
from jobs.report_style import STYLE
from jobs.report_tables import evaluation_table, plain_table, sample_cards, size, span, when


def write_report(storage: Storage, run: str) -> None:
    """Write RUN/report.html; parts whose files are absent say so or are left out.

    Raises ConfigError when the run has no config.yaml.
    """
    storage.child(run).write_text("report.html", page(read_run(storage, run)))


def page(files: RunFiles) -> str:
    """The whole page as HTML."""
    steps, restarts = course(files.steps)
    parts = [
        _header(files, steps),
        _facts(files, steps),
        _notices(files),
        _compression(files.compression),
        "" if files.compression and not steps else _curves(steps, restarts),
        _evaluation(files.results),
        _samples(files.results),
        _explanations(files.results),
        _checkpoints(files.checkpoints),
        _events(files.events),
        _machine(files),
        f'<h2>Resolved configuration</h2><div class="card"><details><summary>config.yaml</summary>'
        f"<pre>{escape(files.config_text)}</pre></details></div>",
        f"<footer>Made from the files of the run as of {when(files.status.get('updated_unix')) or 'unknown'}.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(files.run)} &middot; Telar</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(part for part in parts if part)}</main></body></html>\n"
    )


def _state(files: RunFiles, steps: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The state to show and its colour; while the report stage itself runs, what is complete counts."""
    state, wanted = files.status.get("state", "unknown"), files.status.get("steps")
    if state in ("failed", "stopped"):
        return state, "bad" if state == "failed" else "warn"
    if state in ("finished", "reporting"):
        if files.compression and not steps:
            return "compressed", "good"
        if not steps or wanted is None or steps[-1]["step"] < wanted:
            return "incomplete", "warn"
        if files.results is None:
            return "trained, not evaluated", "warn"
        return ("evaluation incomplete", "bad") if files.results.get("failed") else ("finished", "good")
    return state, "warn"


def _header(files: RunFiles, steps: Sequence[dict[str, Any]]) -> str:
    state, colour = _state(files, steps)
    started = when(files.status.get("started_unix"))
    job = files.status.get("job_id") or files.job.get("submission_id")
    outcome = f" ({files.job['status']})" if files.job.get("status") else ""
    line = [f"started {started}" if started else "", f"Ray job {job}{outcome}" if job else ""]
    return (
        '<p class="eyebrow">Telar run</p>'
        f'<header><h1>{escape(files.run)}</h1><span class="badge {colour}">{escape(state)}</span></header>'
        f'<p class="soft">{escape(", ".join(part for part in line if part))}</p>'
    )


def _facts(files: RunFiles, steps: Sequence[dict[str, Any]]) -> str:
    facts = []
    if steps:
        last, wanted = steps[-1], files.status.get("steps")
        seconds = sum(record["step_seconds"] for record in steps)
        facts += [
            ("steps", f"{last['step']:,}", "", f"of {wanted:,}" if wanted else ""),
            ("target tokens", short(last["tokens"]), "", f"{last['tokens']:,}"),
            ("training time", span(seconds), "", _wall(files)),
            ("throughput", f"{last['tokens'] / seconds:,.0f}" if seconds else "", "tokens/s", "mean over all steps"),
        ]
    parameters = next((c["parameters"] for c in reversed(files.checkpoints) if c.get("parameters")), None)
    if parameters:
        facts.append(("parameters", short(parameters), "", f"{parameters:,}"))
    if steps:
        facts.append(("training loss", f"{steps[-1]['loss']:.3f}", "nats/token", f"{steps[0]['loss']:.3f} at first"))
    figures = []
    for cell, metric in _headlines(files.results):
        beside = ", ".join(f"{base['name']} {base['value']:.3f}" for base in metric["baselines"][:2])
        title = f"{metric['label']}, {cell['corpus']}"
        figures.append((title, f"{metric['value']:.3f}", metric["unit"], beside))
    return "".join(_boxes(group) for group in (facts, figures) if group)


def _boxes(facts: Sequence[tuple[str, str, str, str]]) -> str:
    boxes = "".join(
        f'<div class="fact"><span>{escape(name)}</span><b>{escape(value)}<small>{escape(unit)}</small></b>'
        f"<i>{escape(note)}</i></div>"
        for name, value, unit, note in facts
    )
    return f'<section class="facts">{boxes}</section>'


def _headlines(results: dict[str, Any] | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The first metric of the first cell of each task: the overall likelihood, the summaries, the completions."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for cell in (results or {}).get("cells", []):
        if cell["metrics"]:
            found.setdefault(cell["task"], (cell, cell["metrics"][0]))
    return list(found.values())


def _wall(files: RunFiles) -> str:
    started, updated = files.status.get("started_unix"), files.status.get("updated_unix")
    return f"run {span(updated - started)}" if started and updated else ""


def _notices(files: RunFiles) -> str:
    notices = []
    message = files.status.get("message")
    if message:
        title = "The run failed" if files.status.get("state") == "failed" else "Last message"
        notices.append((title, str(message)))
    for failure in (files.results or {}).get("failed", []):
        notices.append(("A cell of the evaluation has no result", str(failure)))
    return "".join(
        f'<div class="card notice bad" style="margin-top:16px"><b>{escape(title)}</b><pre>{escape(text)}</pre></div>'
        for title, text in notices
    )


def _curves(steps: Sequence[dict[str, Any]], restarts: Sequence[dict[str, Any]]) -> str:
    if not steps:
        return '<h2>Training</h2><p class="soft">No step has been recorded in metrics.jsonl.</p>'
    x = [record["step"] for record in steps]
    marks = [Mark(r["step"], f"attempt {r['attempt']} starts at step {r['step']}") for r in restarts]
    token_marks = [Mark(r["tokens"], f"attempt {r['attempt']} starts at step {r['step']}") for r in restarts]
    half_life = max(1.0, len(steps) / 60)

    def values(name: str) -> list[float]:
        return [float(record[name]) for record in steps]

    def pair(name: str, xs: Sequence[float]) -> list[Series]:
        raw = values(name)
        return [Series("each step", xs, raw, "raw"), Series("smoothed", xs, smoothed(raw, half_life))]

    tokens = values("tokens")
    plain_nll = Series("plain", tokens, smoothed(values("nll"), half_life), "second")
    wait = [100 * r["data_wait_seconds"] / r["step_seconds"] if r["step_seconds"] else 0.0 for r in steps]
    memory = [r["memory_bytes"] / 2**30 for r in steps]
    loss_unit = "nats/token, label-smoothed"
    charts = [
        line_chart("Loss", pair("loss", x), "step", loss_unit, marks),
        line_chart("Loss", [*pair("loss", tokens), plain_nll], "target tokens", "nats/token", token_marks),
        line_chart("Learning rate", [Series("", x, values("learning_rate"))], "step", "", marks, from_zero=True),
        line_chart("Gradient norm", pair("grad_norm", x), "step", "before clipping", marks, from_zero=True),
        line_chart("Throughput", pair("tokens_per_second", x), "step", "target tokens/s", marks, from_zero=True),
        line_chart(
            "Waiting for data",
            [Series("each step", x, wait, "raw"), Series("smoothed", x, smoothed(wait, half_life))],
            "step",
            "% of the step, rank 0",
            marks,
            from_zero=True,
        ),
        line_chart("Memory", [Series("", x, memory)], "step", "GiB, peak resident size of rank 0", marks, True),
        line_chart(
            "World size",
            [Series("", x, values("world_size"), stepped=True)],
            "step",
            "training ranks",
            marks,
            from_zero=True,
            whole=True,
        ),
    ]
    median = statistics.median(values("step_seconds"))
    note = f"median step {span(median)}" + (f", {len(restarts)} restart{'s' * (len(restarts) > 1)}" if restarts else "")
    return f'<h2>Training <small>{note}</small></h2><section class="charts">{"".join(charts)}</section>'


def _compression(record: dict[str, Any]) -> str:
    if not record.get("rows"):
        return ""
    origin = record["source"]
    title = f"{record['compression']['label']} of step {origin['step']:,} of {origin['run']}"
    tables = plain_table(HEAD, table_rows(record), right=range(1, len(HEAD)))
    if tasks := task_rows(record):
        head = task_head(record)
        tables += plain_table(head, tasks, right=range(1, len(head)))
    return f'<h2>Compression <small>{escape(title)}</small></h2><div class="card">{tables}</div>'


def _evaluation(results: dict[str, Any] | None) -> str:
    if results is None:
        return '<h2>Evaluation</h2><div class="card notice">This run has not been evaluated.</div>'
    steps = results["settings"].get("averaged_steps", [])
    made_of = f", mean of {len(steps)} checkpoints from step {steps[0]:,}" if len(steps) > 1 else ""
    note = (
        f"checkpoint of step {results['step']:,}{made_of}, {results['records']:,} records, "
        f"{results['evaluators']} evaluators, {span(results['seconds'])}"
    )
    legend = (
        '<p class="soft" style="margin-top:14px">Intervals are 95% bootstrap intervals over held-out records; '
        "differences are paired. Green: the model is better than the baseline beyond the interval; red: worse; "
        f"uncoloured: not told apart. N-grams are counted on the {results['training_tokens_counted']:,} target tokens "
        "that the model was trained on.</p>"
    )
    return (
        f"<h2>Evaluation <small>{escape(note)}</small></h2>"
        f'<div class="card">{evaluation_table(results["cells"])}{legend}</div>'
        f"{_energy(results.get('energy', []))}"
    )


def _energy(cells: Sequence[dict[str, Any]]) -> str:
    """What answering took, cell by cell, and in which way the joules are known."""
    if not cells:
        return ""
    rows = [
        (
            cell["corpus"],
            cell["task"],
            f"{cell['joules']:,.1f}",
            f"{cell['joules_per_record']:.3g}",
            f"{cell['joules_per_token']:.3g}" if cell["joules_per_token"] is not None else "",
            span(cell["seconds"]),
            cell["kind"],
        )
        for cell in cells
    ]
    head = ("corpus or task", "figure", "joules", "per record", "per token", "evaluator time", "joules are")
    note = (
        '<p class="soft">Measured: share of the processor packages\' own counters by CPU time. Estimated: CPU time of '
        "the evaluators times 4 W a thread. Energy of memory, cooling and idle machines is in neither.</p>"
    )
    return f'<div class="card"><h3>Energy of evaluation</h3>{plain_table(head, rows, right=(2, 3, 4, 5))}{note}</div>'


def _samples(results: dict[str, Any] | None) -> str:
    samples = (results or {}).get("samples", [])
    if results is None or not samples:
        return ""
    decoding = escape(results["settings"]["decoding"])
    title = f"<h2>Samples <small>{len(samples)} held-out records, outputs by {decoding}</small></h2>"
    return title + sample_cards(samples)


def _explanations(results: dict[str, Any] | None) -> str:
    found = (results or {}).get("explanations", [])
    if not found:
        return ""
    note = (
        '<p class="soft">Of a word, above: integrated gradients of the choice (green for it, red against it); below: '
        "attention rollout. Maps have what looks in rows and what is looked at in columns; each row sums to 1, or to "
        "less where the rest lies on the other stack. Heads are averaged.</p>"
    )
    title = f"<h2>What choices rest on <small>{len(found)} held-out records</small></h2>"
    return title + note + "".join(map(explanation_card, found))


def _checkpoints(checkpoints: Sequence[dict[str, Any]]) -> str:
    if not checkpoints:
        return ""
    rows = [
        (f"{c['step']:,}", c["damaged"], "", "", "", "")
        if "damaged" in c
        else (
            f"{c['step']:,}",
            f"attempt {c['attempt']}",
            str(c["world_size"]),
            f"{c['tokens']:,}" if c["tokens"] is not None else "",
            size(c["bytes"]),
            c["digest"][:16],
        )
        for c in checkpoints
    ]
    head = ("step", "written by", "ranks", "target tokens", "size", "digest of the manifest")
    table = plain_table(head, rows, right=(0, 2, 3, 4))
    return f'<h2>Checkpoints <small>committed and kept</small></h2><div class="card">{table}</div>'


def _events(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return ""
    first = events[0]["unix_seconds"]
    rows = []
    for event in events:
        rest = {k: v for k, v in event.items() if k not in ("unix_seconds", "event") and v not in (None, [], "")}
        detail = ", ".join(_detail(key, value) for key, value in rest.items())
        rows.append((f"+{span(event['unix_seconds'] - first)}", event["event"].replace("_", " "), detail))
    stages = [e for e in events if e["event"] in ("stage_finished", "stage_skipped")]
    note = ", ".join(
        f"{e['stage']} " + (span(e["seconds"]) if e["event"] == "stage_finished" else "already done") for e in stages
    )
    table = plain_table(("time", "event", "detail"), rows, right=(0,))
    return (
        f'<h2>Events <small>{escape(note)}</small></h2><div class="card">'
        f"<details{' open' if len(rows) <= 14 else ''}><summary>{len(rows)} events</summary>{table}</details></div>"
    )


def _detail(key: str, value: Any) -> str:
    """One field of an event in words: `bytes` and `seconds` with their units, a stage or a detail as it is."""
    if key == "bytes":
        return size(value)
    if key in ("seconds", "stage", "detail"):
        return span(value) if key == "seconds" else str(value)
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return f"{key.replace('_', ' ')} {text}"


def _machine(files: RunFiles) -> str:
    """Versions, hardware and digests, as the run recorded them."""
    results, newest = files.results or {}, files.checkpoints[-1] if files.checkpoints else {}
    versions = {**newest.get("versions", {}), **results.get("versions", {})}
    hardware = newest.get("hardware") or results.get("hardware") or {}
    facts = []
    for key, value in hardware.items():
        if key == "memory_bytes":
            facts.append(("memory", size(value)))
        elif key == "gpus":
            facts.append(("GPUs", ", ".join(value) or "none"))
        else:
            facts.append((key.replace("_", " "), str(value)))
    names = {"digest": "data", "tokenizer_digest": "tokenizer", "vocabulary_size": "vocabulary, entries"}
    digests = [(label, str(files.manifest[key])) for key, label in names.items() if key in files.manifest]
    if results.get("checkpoint_digest"):
        digests.append(("evaluated checkpoint", results["checkpoint_digest"]))
    blocks = [("Versions", sorted(versions.items())), ("Hardware", facts), ("Digests", digests)]
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{plain_table(("", ""), rows)}</div>' for title, rows in blocks if rows
    )
    return f'<h2>Versions and hardware</h2><section class="two">{cards}</section>' if cards else ""
