"""Verbs that start, follow and stop runs."""

from __future__ import annotations

import sys
from typing import Any

import click

from jobs.verbs.options import STAGE_NAMES, address, as_json, embedded, overrides, print_result, storage, writer


@click.command()
@click.argument("config", required=False)
@click.option("--resume", metavar="RUN", help="Continue this run with its stored configuration and --set.")
@click.option("--or-resume", is_flag=True, help="Continue the run of CONFIG if it exists: for jobs that are retried.")
@click.option("--stage", type=click.Choice(STAGE_NAMES), help="Run this stage only.")
@click.option("--wait", is_flag=True, help="Follow the job to its end; the exit code is its outcome.")
@click.option("--down", is_flag=True, help="With --wait: end the embedded cluster if this command started it.")
@address
@embedded
@storage
@overrides
@as_json
def submit(
    config: str | None,
    resume: str | None,
    or_resume: bool,
    stage: str | None,
    wait: bool,
    down: bool,
    address: str | None,
    embedded: bool,
    storage: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Submit a run as a Ray job: codebook (for pictures), prepare, train, evaluate, report; what is done is skipped."""
    if down and not wait:
        raise click.UsageError("--down ends the cluster after the job, so it needs --wait; or use `telar down`")
    from jobs.commands.submitting import Request

    request = Request(config, overrides, resume, storage, address, embedded, stage, or_resume)
    _submit(request, wait, down, as_json)


@click.command()
@click.argument("config")
@address
@embedded
@storage
@overrides
@as_json
def prepare(
    config: str, address: str | None, embedded: bool, storage: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Prepare data and tokenizer only (the job's first stage), and wait for it."""
    from jobs.commands.submitting import Request

    request = Request(config, overrides, None, storage, address, embedded, stage="prepare")
    _submit(request, wait=True, down=False, as_json=as_json)


def _submit(request: Any, wait: bool, down: bool, as_json: bool) -> None:
    from jobs.commands.submitting import submit

    submitted = submit(request, lambda line: click.echo(line, err=True))
    result = submitted.as_dict()
    if not wait:
        print_result(as_json, result, submitted.as_text())
        return
    if not as_json:
        click.echo(submitted.as_text())
    from jobs.commands.following import INTERRUPTED, follow_job

    code = None
    try:
        code = follow_job(submitted.jobs, submitted.place, submitted.job_id, writer(to_stderr=as_json))
    finally:
        if down and code != INTERRUPTED and submitted.started_cluster:
            from jobs.commands.clusters import take_down

            click.echo(take_down(force=False)["message"], err=True)
    if as_json:
        print_result(True, {**result, "exit_code": code, "status": submitted.place.status()}, "")
    sys.exit(code)


@click.command()
@click.argument("run", required=False)
@storage
@as_json
def status(run: str | None, storage: str | None, as_json: bool) -> None:
    """State of a run, from storage; exit code 1 if it failed, 3 if it was stopped. Without RUN: all runs."""
    from jobs.commands import runs

    if run is None:
        _list(storage, as_json)
        return
    place = runs.locate(run, storage)
    current = place.status()
    result = {"run": place.name, "url": place.url, "state": runs.state_of(current), "status": current}
    print_result(as_json, result, runs.summary(place.name, current) + f"\nfiles {place.url}")
    sys.exit(runs.TERMINAL.get(result["state"], 0))


@click.command(name="list")
@storage
@as_json
def list_runs(storage: str | None, as_json: bool) -> None:
    """Runs in the storage, newest first."""
    _list(storage, as_json)


def _list(storage: str | None, as_json: bool) -> None:
    from jobs.commands import runs

    where = runs.storage_for(storage)
    found = [(name, runs.RunPlace(where, name).status()) for name in runs.names(where)]
    found.sort(key=lambda entry: (entry[1] or {}).get("started_unix", float("inf")), reverse=True)
    rows = [
        {"run": name, "state": runs.state_of(current), "step": (current or {}).get("step"), "status": current}
        for name, current in found
    ]
    lines = [runs.summary(name, current).split("\n")[0] for name, current in found]
    print_result(as_json, {"storage": where.url, "runs": rows}, "\n".join(lines) or f"no runs in {where.url}")


@click.command()
@click.argument("run")
@address
@storage
@as_json
def watch(run: str, address: str | None, storage: str | None, as_json: bool) -> None:
    """Show a run's progress until it ends; the exit code is its outcome."""
    from jobs.commands import following, runs

    place = runs.locate(run, storage)
    live = sys.stdout.isatty() and not as_json
    code = following.watch(place, address, live, lambda line: click.echo(line, err=as_json))
    if as_json:
        print_result(True, {"run": place.name, "exit_code": code, "status": place.status()}, "")
    sys.exit(code)


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), help="The log of one training rank instead of the job's.")
@address
@storage
@as_json
def logs(run: str, follow: bool, rank: int | None, address: str | None, storage: str | None, as_json: bool) -> None:
    """What a run printed: the job's own lines, or one rank's log."""
    from jobs.commands import following, runs

    place, parts = runs.locate(run, storage), []
    write = parts.append if as_json else writer(to_stderr=False)
    if rank is None:
        code = following.job_logs(place, address, follow, write)
    else:
        code = following.rank_logs(place, rank, follow, write)
    if as_json:
        print_result(True, {"run": place.name, "rank": rank, "text": "".join(parts), "exit_code": code}, "")
    sys.exit(code)


@click.command()
@click.argument("run")
@click.option("--now", is_flag=True, help="Do not wait for a checkpoint: end the job's entrypoint through Ray.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Longest wait, seconds."
)
@address
@storage
@as_json
def stop(run: str, now: bool, timeout: float, address: str | None, storage: str | None, as_json: bool) -> None:
    """Commit a checkpoint and stop a run; `telar submit --resume RUN` continues it."""
    from jobs.commands import following, runs

    place = runs.locate(run, storage)
    before = runs.state_of(place.status())
    state = following.stop(place, address, now, timeout, lambda line: click.echo(line, err=True))
    note = "had ended before: " if before in runs.TERMINAL else ""
    print_result(as_json, {"run": place.name, "state": state}, f"run {place.name}: {note}{state}")


@click.command()
@click.argument("run")
@click.option(
    "--tasks",
    "named",
    metavar="A,B",
    help="Also these tasks: built-in names (all: every one) or YAML files, with commas between.",
)
@click.option("--datasets", metavar="URL", help="Folder of the files of built-in tasks (evaluate.datasets).")
@click.option(
    "--allow-code-execution", "code", is_flag=True, help="Run programs that the model writes (humaneval, mbpp)."
)
@click.option(
    "--lm-eval", metavar="A,B", help="Tasks of lm-evaluation-harness, by name or YAML file; needs telar[lm-eval]."
)
@address
@storage
@overrides
@as_json
def evaluate(
    run: str,
    named: str | None,
    datasets: str | None,
    code: bool,
    lm_eval: str | None,
    address: str | None,
    storage: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Evaluate the latest checkpoint of RUN as a Ray job, and wait for it; what is answered already is kept."""
    from jobs.commands.submitting import Request
    from jobs.commands.task_listing import evaluate_overrides

    changes = (*overrides, *evaluate_overrides(named, datasets, code, lm_eval))
    _submit(Request(None, changes, run, storage, address, False, stage="evaluate"), True, False, as_json)


VERBS = (submit, prepare, status, list_runs, watch, logs, stop, evaluate)
