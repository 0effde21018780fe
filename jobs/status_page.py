"""The status page of a run: one view as HTML without a script; the browser asks again every few seconds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jobs.report_data import smoothed
from jobs.report_plots import Mark, Series, line_chart, thinned
from jobs.report_style import STYLE
from jobs.report_tables import plain_table, size, span, when
from jobs.run_view import RunView

RELOAD_SECONDS = 5
EVENTS_SHOWN = 40
COMMITS_SHOWN = 8
OWN_STYLE = """
.bar { height: 10px; border-radius: 5px; background: var(--line); overflow: hidden; margin: 18px 0 0; }
.bar i { display: block; height: 100%; background: var(--accent); }
form { display: flex; gap: 10px; margin-top: 16px; } input { flex: 1 1 auto; font: inherit; padding: 6px 10px; }
button { font: inherit; padding: 6px 14px; }
"""
BADGES = {"finished": "good", "training": "good", "failed": "bad", "silent": "bad"}


def page(shown: RunView) -> str:
    """The page of a run; what others wrote is escaped, addresses of other places are not in it."""
    parts = [
        f'<p class="eyebrow">Telar run, read only, as of now</p><header><h1>{escape(shown.run)}</h1>'
        f'<span class="badge {BADGES.get(shown.state, "warn")}">{escape(shown.state)}</span></header>',
        _progress(shown),
        _facts(shown),
        f'<div class="card notice"><pre>{escape(shown.message)}</pre></div>' if shown.message else "",
        _curves(shown),
        _attempts(shown),
        _commits(shown),
        _events(shown),
    ]
    return document(shown.run, "".join(parts), reload=not shown.is_over)


def token_form(run: str, refused: bool) -> str:
    """What a reader without the token sees: nothing of the run but its name."""
    words = "This is not the cluster's token." if refused else "The cluster's token, as Ray's dashboard asks for it:"
    return document(
        run,
        f'<p class="eyebrow">Telar run</p><h1>{escape(run)}</h1><p>{words}</p><form method="post" action="/token">'
        '<input name="token" type="password" autocomplete="off" autofocus><button>Show</button></form>',
        reload=False,
    )


def document(title: str, body: str, reload: bool) -> str:
    """A whole HTML page; with `reload` it is asked for again every few seconds."""
    again = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if reload else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{escape(title)} &middot; Telar</title><style>{STYLE}{OWN_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _progress(shown: RunView) -> str:
    if not shown.steps:
        return ""
    share = min(1.0, shown.step / shown.steps)
    words = f"step {shown.step:,} of {shown.steps:,} ({share:.0%})"
    words += f", {span(shown.eta_seconds)} left" if shown.eta_seconds is not None else ""
    words += f", stage {escape(shown.stage)}" if shown.stage and not shown.is_over else ""
    bar = f'<div class="bar" role="progressbar" aria-valuenow="{share:.3f}"><i style="width: {share:.2%}"></i></div>'
    return f'{bar}<p class="soft" id="progress">{words}</p>'


def _facts(shown: RunView) -> str:
    commit = "none yet" if shown.last_commit_step is None else f"step {shown.last_commit_step:,}"
    age = shown.last_commit_age_seconds
    facts = [
        ("loss", "-" if shown.loss is None else f"{shown.loss:.3f}", "nats per target token"),
        ("tokens per second", f"{shown.tokens_per_second:,.0f}" if shown.tokens_per_second else "-", "all ranks"),
        ("step time", "-" if shown.step_seconds is None else f"{shown.step_seconds:.3f} s", "median of the last 50"),
        ("data wait", "-" if shown.data_wait_share is None else f"{shown.data_wait_share:.1%}", "of the last 50 steps"),
        ("world size", str(shown.world_size), shown.slowest_rank or ""),
        ("attempts", str(len(shown.attempts)), f"{shown.failures} failed"),
        ("last commit", commit, "" if age is None or shown.is_over else f"{span(age)} ago"),
    ]
    boxes = "".join(
        f'<div class="fact"><span>{name}</span><b>{escape(value)}</b><i>{escape(note)}</i></div>'
        for name, value, note in facts
    )
    return f'<div class="facts">{boxes}</div>'


def _curves(shown: RunView) -> str:
    if not shown.records:
        return ""
    steps = [record["step"] for record in shown.records]
    marks = [Mark(record["step"], f"attempt {record['attempt']} from here") for record in shown.restarts]

    def lines(values: Sequence[float], smooth: bool) -> list[Series]:
        raw = Series("each step", *thinned(steps, values), style="raw")
        if not smooth:
            return [Series("each step", *thinned(steps, values))]
        return [raw, Series("smoothed", *thinned(steps, smoothed(list(values), max(1.0, len(values) / 60))))]

    loss = [record["loss"] for record in shown.records]
    speed = [record["tokens_per_second"] for record in shown.records]
    return (
        '<h2>Curves</h2><div class="charts">'
        + line_chart("Training loss", lines(loss, True), "step", "nats per target token", marks)
        + line_chart("Throughput", lines(speed, False), "step", "target tokens per second", marks, from_zero=True)
        + "</div>"
    )


def _attempts(shown: RunView) -> str:
    rows = [
        (str(one.number), str(one.world_size), f"{one.from_step:,}", when(one.started_unix), one.ended or "goes on")
        for one in reversed(shown.attempts)
    ]
    return _section("Attempts", "", ("attempt", "ranks", "from step", "started", "end"), rows, (0, 1, 2))


def _commits(shown: RunView) -> str:
    rows = [
        (f"{one['step']:,}", str(one.get("attempt", "")), size(one.get("bytes")), when(one["unix_seconds"]))
        for one in reversed(shown.commits[-COMMITS_SHOWN:])
    ]
    note = f"{len(shown.commits)} committed"
    return _section("Checkpoints", note, ("step", "attempt", "size", "committed"), rows, (0, 1, 2))


def _events(shown: RunView) -> str:
    rows = [(when(event.unix_seconds), event.text) for event in reversed(shown.events[-EVENTS_SHOWN:])]
    return _section("Events", f"the last {len(rows)}", ("time", "event"), rows, ())


def _section(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    if not rows:
        return ""
    table = plain_table(head, rows, right=right)
    return f'<h2>{title} <small>{escape(note)}</small></h2><div class="card">{table}</div>'
