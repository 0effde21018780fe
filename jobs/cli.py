"""The `telar` command: verbs and their options. Each body imports what it needs, so that `telar --help` is fast.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 stopped, 4 no cluster answers (130 after Ctrl-C).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from configs.errors import ConfigError, TelarError
from jobs.commands.task_verbs import tasks

STAGE_NAMES = ("codebook", "prepare", "train", "evaluate", "report")

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object (follow output goes to stderr).")
storage = click.option("--storage", metavar="URL", help="Folder or fsspec URL of runs (TELAR_STORAGE, run.storage).")
address = click.option("--address", metavar="URL", help="Dashboard of a running cluster, e.g. http://host:8265.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Change a field of the configuration; may be repeated."
)
embedded = click.option(
    "--embedded", is_flag=True, help="Use the cluster on this machine, whatever RAY_ADDRESS and the configuration say."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Train and evaluate a transformer on a Ray cluster from one YAML file.

    RUN is a run's name or its URL.
    """


@cli.command()
@click.option("--address", metavar="URL", help="Also check this cluster.")
@storage
@as_json
def doctor(address: str | None, storage: str | None, as_json: bool) -> None:
    """Check versions, hardware, storage, ports and cluster; say what to fix."""
    from jobs.doctor import examine

    checks = examine(storage, address)
    _print(
        as_json,
        {"ok": all(check.state != "fail" for check in checks), "checks": [check.as_dict() for check in checks]},
        "\n".join(check.as_line() for check in checks),
    )
    sys.exit(1 if any(check.state == "fail" for check in checks) else 0)


@cli.command()
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


@cli.command()
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
        _print(as_json, result, submitted.as_text())
        return
    if not as_json:
        click.echo(submitted.as_text())
    from jobs.commands.following import INTERRUPTED, follow_job

    code = None
    try:
        code = follow_job(submitted.jobs, submitted.place, submitted.job_id, _writer(to_stderr=as_json))
    finally:
        if down and code != INTERRUPTED and submitted.started_cluster:
            from jobs.commands.clusters import take_down

            click.echo(take_down(force=False)["message"], err=True)
    if as_json:
        _print(True, {**result, "exit_code": code, "status": submitted.place.status()}, "")
    sys.exit(code)


@cli.command()
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
    _print(as_json, result, runs.summary(place.name, current) + f"\nfiles {place.url}")
    sys.exit(runs.TERMINAL.get(result["state"], 0))


@cli.command(name="list")
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
    _print(as_json, {"storage": where.url, "runs": rows}, "\n".join(lines) or f"no runs in {where.url}")


@cli.command()
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
        _print(True, {"run": place.name, "exit_code": code, "status": place.status()}, "")
    sys.exit(code)


@cli.command()
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
    write = parts.append if as_json else _writer(to_stderr=False)
    if rank is None:
        code = following.job_logs(place, address, follow, write)
    else:
        code = following.rank_logs(place, rank, follow, write)
    if as_json:
        _print(True, {"run": place.name, "rank": rank, "text": "".join(parts), "exit_code": code}, "")
    sys.exit(code)


@cli.command()
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
    _print(as_json, {"run": place.name, "state": state}, f"run {place.name}: {note}{state}")


@cli.command()
@click.option("--out", type=click.Path(file_okay=False), default="monitoring", show_default=True, help="Folder.")
@click.option("--token-file", type=click.Path(), help="Holds the cluster's token; default: the embedded cluster's.")
@click.option("--prometheus", metavar="URL", default="http://127.0.0.1:9090", show_default=True, help="For Grafana.")
@address
@as_json
def monitor(out: str, token_file: str | None, prometheus: str, address: str | None, as_json: bool) -> None:
    """Write prometheus.yml, Grafana's dashboard and its provisioning for a cluster."""
    from jobs.commands.monitoring import monitor as write_files

    written = write_files(Path(out), address, token_file, prometheus)
    _print(as_json, written, written["message"])


@cli.command()
@click.argument("config")
@click.option("--to", "system", type=click.Choice(("kuberay", "slurm", "ray-up")), required=True)
@click.option("--nodes", type=click.IntRange(1), help="Machines with ranks; default: as many as the ranks need.")
@click.option("--gpus-per-node", type=click.IntRange(1), help="Default: 8, or all ranks if they are fewer.")
@click.option("--cpus-per-node", type=click.IntRange(1), help="Default: cluster.cpus_per_rank for each rank and 2.")
@click.option("--memory-gib", type=click.IntRange(1), help="Memory per machine; default: 16 GiB for each rank.")
@click.option("--image", help="kuberay: container image with Telar installed.")
@click.option("--claim", help="kuberay: a ReadWriteMany volume claim, mounted at /shared in all pods.")
@click.option("--shared", metavar="DIR", help="slurm: a folder that all machines see, e.g. /home.")
@click.option("--time", "limit", default="24:00:00", show_default=True, help="slurm: time limit of one allocation.")
@click.option("--hosts", help="ray-up: machines that are there, separated by commas, the head first.")
@click.option("--region", help="ray-up on AWS.")
@click.option("--instance-type", help="ray-up on AWS: machines with ranks.")
@click.option("--user", default="ubuntu", show_default=True, help="ray-up: who logs in by SSH.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write here instead of to the terminal.")
@storage
@overrides
def deploy(config: str, storage: str | None, overrides: tuple[str, ...], out: str | None, **options: Any) -> None:
    """Write what brings a run onto Kubernetes (KubeRay), Slurm or machines of `ray up`."""
    from jobs.commands.deploying import Target, manifest

    text = manifest(config, overrides, storage, Target(**options))
    if out is None:
        click.echo(text, nl=False)
        return
    Path(out).write_text(text)
    click.echo(f"wrote {out}", err=True)


@cli.command()
@click.argument("target", metavar="CONFIG|MANIFEST|RUN")
@click.option("--at", type=click.IntRange(0, 2**60), help="Show the sample at this position of the run's order.")
@click.option("--samples", "count", type=click.IntRange(1, 10_000), default=1, show_default=True, help="With --at.")
@storage
@overrides
@as_json
def inspect(
    target: str, at: int | None, count: int, storage: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Show prepared data: shards, tokens, mixture and lengths, or with --at the decoded samples at a position."""
    from jobs.commands import inspect_text, inspecting

    result = inspecting.inspect(target, storage, overrides, at, count)
    _print(as_json, result, "" if as_json else inspect_text.on(sys.stdout, result))


@cli.command()
@click.argument("config", required=False)
@click.option("--nodes", type=click.IntRange(1, 100_000), help="Nodes; default: as many as the configuration fills.")
@click.option("--gpus-per-node", type=click.IntRange(1, 1024), help="Devices in a node; default: the device's.")
@click.option("--device", metavar="NAME|FILE", help="h100, h200, a100, cpu, or a YAML file of a device's fields.")
@click.option(
    "--assume", "assumed", multiple=True, metavar="A=B", help="Software that Telar is not: recompute=full, ..."
)
@click.option("--mtbf", metavar="TIME", help="Mean time between failures of the whole run, e.g. 3h.")
@click.option("--simulate", metavar="TIME", help="Simulate so long a run against failures, e.g. 30d.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the simulation.")
@click.option("--spares", type=click.IntRange(min=0), help="Spare nodes of the simulation; default: always one.")
@click.option("--plot", metavar="PNG", help="With --simulate: draw progress and losses.")
@click.option("--layouts", "rows", type=click.IntRange(1, 10_000), default=10, show_default=True, help="Layouts shown.")
@click.option("--published", is_flag=True, help="Show predictions for published runs instead; needs no CONFIG.")
@overrides
@as_json
def plan(config: str | None, rows: int, published: bool, as_json: bool, **question: Any) -> None:
    """What a run will need: memory, layouts, time, energy, checkpoints, goodput. Needs no cluster and no GPU."""
    from jobs.commands import planning

    if published:
        result, text = planning.published(None if as_json else sys.stdout)
        _print(as_json, result, text)
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG' (or --published)")
    found = planning.plan(config, **question)
    _print(as_json, found.facts, "" if as_json else planning.on(sys.stdout, found, rows))


@cli.command()
@click.argument("run")
@storage
@as_json
def report(run: str, storage: str | None, as_json: bool) -> None:
    """Write RUN/report.html anew from the run's files."""
    from jobs.commands import runs
    from jobs.report import write_report

    place = runs.locate(run, storage)
    write_report(place.storage, place.name)
    _print(as_json, {"run": place.name, "report": f"{place.url}/report.html"}, f"{place.url}/report.html")


@cli.command()
@click.argument("run")
@click.option(
    "--tasks",
    "named",
    metavar="A,B",
    help="Also these tasks: built-in names (all: every one) or YAML files, with commas between.",
)
@click.option("--datasets", metavar="URL", help="Folder of the files of built-in tasks (evaluate.datasets).")
@address
@storage
@overrides
@as_json
def evaluate(
    run: str,
    named: str | None,
    datasets: str | None,
    address: str | None,
    storage: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Evaluate the latest checkpoint of RUN as a Ray job, and wait for it; what is answered already is kept."""
    from jobs.commands.submitting import Request
    from jobs.commands.task_listing import evaluate_overrides

    changes = (*overrides, *evaluate_overrides(named, datasets))
    _submit(Request(None, changes, run, storage, address, False, stage="evaluate"), True, False, as_json)


cli.add_command(tasks)


@cli.command()
@click.argument("run")
@click.argument("text", nargs=-1)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest output.")
@click.option("--beams", type=click.IntRange(min=1), help="Beam search instead of the most probable token.")
@click.option("--alpha", type=float, default=0.6, show_default=True, help="Length penalty of beam search.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Draw tokens, logits divided by it.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Draw from the K most probable tokens only.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Draw from this probability mass."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--step", type=click.IntRange(min=1), help="A committed step; default: the latest.")
@click.option("--average", type=click.IntRange(min=1), default=1, help="Average the last K checkpoints.")
@click.option("--out", type=click.Path(dir_okay=False), help="PNG to write, for a run that makes pictures of texts.")
@storage
@as_json
def generate(
    run: str,
    text: tuple[str, ...],
    max_new_tokens: int,
    out: str | None,
    step: int | None,
    average: int,
    storage: str | None,
    as_json: bool,
    **choice: Any,
) -> None:
    """Write what the run's model answers to each TEXT (default: to each line of standard input)."""
    from jobs.commands import generating, runs

    place = runs.locate(run, storage)
    sources = list(text) or [line.rstrip("\n") for line in sys.stdin]
    if out is not None:
        if len(sources) != 1:
            raise ConfigError(f"--out: one TEXT makes one picture, {len(sources)} were given")
        made = generating.generate_picture(place, sources[0], out, generating.Choice(**choice), step, average)
        text = f"{made['file']}: {made['side']} x {made['side']} pixels of {len(made['codes'])} codes"
        _print(as_json, {"run": place.name, **made}, text)
        return
    alone = len(sources) == 1 and not as_json and choice["beams"] is None
    write = _writer(to_stderr=False) if alone else None
    outputs = generating.generate_texts(
        place, sources, max_new_tokens, generating.Choice(**choice), step, average, write
    )
    if alone:
        click.echo()
        return
    _print(as_json, {"run": place.name, "outputs": outputs}, "\n".join(output["text"] for output in outputs))


@cli.command()
@click.argument("run")
@click.option("--to", "kind", type=click.Choice(["hf"]), required=True, help="hf: Hugging Face transformers.")
@click.argument("folder", metavar="DIR")
@click.option("--step", type=click.IntRange(min=1), help="A committed step; default: the latest.")
@click.option("--average", type=click.IntRange(min=1), default=1, help="Average the last K checkpoints.")
@storage
@as_json
def export(
    run: str, kind: str, folder: str, step: int | None, average: int, storage: str | None, as_json: bool
) -> None:
    """Write a run's model to DIR in a form that other software loads."""
    from jobs.commands import exporting, runs

    result = exporting.export_run(runs.locate(run, storage), folder, step, average)
    text = f"{result['folder']}: {result['class']}, {result['parameters']:,} parameters, steps {result['steps']}"
    _print(as_json, {**result, "to": kind}, text)


@cli.command()
@click.argument("run")
@click.option("--quantize", metavar="KIND", help="int8-weight, int8-dynamic (activations too) or int4-group.")
@click.option("--group", type=int, default=64, show_default=True, help="int4-group: weights that share a scale.")
@click.option("--prune", type=float, metavar="SHARE", help="Take away this share, e.g. 0.3.")
@click.option(
    "--method", default="structured", show_default=True, help="structured (smaller matrices), wanda or magnitude."
)
@click.option("--pattern", metavar="2:4", help="wanda, magnitude: two of four neighbours stay.")
@click.option(
    "--recover-steps", type=int, default=0, show_default=True, help="structured: train so many steps afterwards."
)
@click.option("--step", type=click.IntRange(min=1), help="A committed step; default: the latest.")
@click.option("--name", help="Name of the new run; default: RUN and what was done.")
@storage
@as_json
def compress(run: str, step: int | None, name: str | None, storage: str | None, as_json: bool, **choice: Any) -> None:
    """Quantize or prune a run's model into a run of its own, and measure size, loss and speed before and after."""
    from jobs.commands import compressing, runs

    result = compressing.compress_run(
        runs.locate(run, storage), choice, step, name, lambda line: click.echo(line, err=True)
    )
    _print(as_json, result, "" if as_json else compressing.on(sys.stdout, result))


@cli.command()
@click.option("--cpus", type=click.IntRange(min=1), help="Logical CPUs; may exceed the cores.")
@click.option("--dashboard-port", type=click.IntRange(1024, 65535), help="First port tried for the dashboard.")
@as_json
def up(cpus: int | None, dashboard_port: int | None, as_json: bool) -> None:
    """Start the embedded cluster, or show the one that runs."""
    from jobs.commands.clusters import bring_up

    result = bring_up(cpus, dashboard_port)
    _print(as_json, result, result["message"])


@cli.command()
@click.option("--force", is_flag=True, help="Also when jobs are running on it.")
@as_json
def down(force: bool, as_json: bool) -> None:
    """End the embedded cluster."""
    from jobs.commands.clusters import take_down

    result = take_down(force)
    _print(as_json, result, result["message"])


def _print(as_json: bool, result: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(result, indent=1, default=str) if as_json else text)


def _writer(to_stderr: bool) -> Callable[[str], None]:
    stream = sys.stderr if to_stderr else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _fail(message: str, exit_code: int) -> int:
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": message, "exit_code": exit_code}))
    click.echo(f"error: {message}", err=True)
    return exit_code


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Last resort for errors that nobody foresaw: one line, and the traceback when TELAR_DEBUG=1 asks for it."""
    if os.environ.get("TELAR_DEBUG") == "1":
        traceback.print_exception(kind, error, trace)
    _fail(f"{kind.__name__}: {error} (a fault in Telar; TELAR_DEBUG=1 shows where)", 1)


def main() -> None:
    """Entry point of the console script."""
    sys.excepthook = _unexpected
    try:
        code = cli.main(prog_name="telar", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        sys.exit(_fail(error.format_message() + hint, 2))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("interrupted", 130))
    except TelarError as error:
        if os.environ.get("TELAR_DEBUG") == "1":
            traceback.print_exc()
        sys.exit(_fail(str(error), error.exit_code))


if __name__ == "__main__":
    main()
