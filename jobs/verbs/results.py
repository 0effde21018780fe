"""Verbs that look at data, models and results, and make other models of them."""

from __future__ import annotations

import sys
from typing import Any

import click

from configs.errors import ConfigError
from jobs.verbs.options import as_json, overrides, print_result, storage, writer


@click.command()
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
    print_result(as_json, result, "" if as_json else inspect_text.on(sys.stdout, result))


@click.command()
@click.argument("run")
@storage
@as_json
def report(run: str, storage: str | None, as_json: bool) -> None:
    """Write RUN/report.html anew from the run's files."""
    from jobs.commands import runs
    from jobs.report import write_report

    place = runs.locate(run, storage)
    write_report(place.storage, place.name)
    print_result(as_json, {"run": place.name, "report": f"{place.url}/report.html"}, f"{place.url}/report.html")


@click.command()
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
        print_result(as_json, {"run": place.name, **made}, text)
        return
    alone = len(sources) == 1 and not as_json and choice["beams"] is None
    write = writer(to_stderr=False) if alone else None
    outputs = generating.generate_texts(
        place, sources, max_new_tokens, generating.Choice(**choice), step, average, write
    )
    if alone:
        click.echo()
        return
    print_result(as_json, {"run": place.name, "outputs": outputs}, "\n".join(output["text"] for output in outputs))


@click.command()
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
    print_result(as_json, {**result, "to": kind}, text)


@click.command()
@click.argument("run")
@click.option("--quantize", metavar="KIND", help="int8-weight, int8-dynamic (activations too) or int4-group.")
@click.option("--group", type=int, default=64, show_default=True, help="int4-group: weights that share a scale.")
@click.option("--prune", type=float, metavar="SHARE", help="Take away this share, e.g. 0.3.")
@click.option(
    "--method", default="structured", show_default=True, help="structured (smaller matrices), wanda or magnitude."
)
@click.option("--pattern", metavar="2:4", help="wanda, magnitude: two of four neighbours stay.")
@click.option(
    "--recover-steps",
    type=int,
    default=0,
    show_default=True,
    help="structured: train so many steps afterwards; quantizing: before it, on rounded weights.",
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
    print_result(as_json, result, "" if as_json else compressing.on(sys.stdout, result))


@click.command()
@click.argument("run")
@click.option("--verify", is_flag=True, help="Read every byte and check its digest; exit code 1 when one is wrong.")
@click.option("--to", "folder", metavar="DIR", help="Write all weights as one safetensors file to DIR.")
@click.option("--step", type=click.IntRange(min=1), help="A committed step; default: all, with --to the latest.")
@click.option("--average", type=click.IntRange(min=1), default=1, help="With --to: average the last K checkpoints.")
@storage
@as_json
def checkpoints(
    run: str, verify: bool, folder: str | None, step: int | None, average: int, storage: str | None, as_json: bool
) -> None:
    """List a run's committed checkpoints, verify them, or write one as a single safetensors file."""
    from jobs.commands import checkpoints as command
    from jobs.commands import runs

    place = runs.locate(run, storage)
    if folder is not None:
        made = command.consolidate(place, folder, step, average)
        print_result(as_json, made, f"{folder}: {made['parameters']:,} parameters of step {made['steps']}")
        return
    found = command.list_checkpoints(place, step, verify)
    print_result(as_json, {"run": place.name, "checkpoints": found}, command.as_text(place, found))
    sys.exit(1 if any(entry["problem"] for entry in found) else 0)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--step-a", type=click.IntRange(min=1), help="A committed step of A; default: its latest.")
@click.option("--step-b", type=click.IntRange(min=1), help="A committed step of B; default: its latest.")
@click.option("--only", metavar="X,Y", help="These corpora and tasks only, with commas between.")
@click.option(
    "--rounds", type=click.IntRange(100, 100_000), default=1000, show_default=True, help="Draws of the bootstrap."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@storage
@as_json
def compare(
    first: str,
    second: str,
    step_a: int | None,
    step_b: int | None,
    only: str | None,
    rounds: int,
    seed: int,
    storage: str | None,
    as_json: bool,
) -> None:
    """Compare runs A and B, or two steps of one run, row by row on what both were evaluated on (paired bootstrap)."""
    from jobs.commands import comparing, runs

    places = runs.locate(first, storage), runs.locate(second, storage)
    chosen = [name.strip() for name in only.split(",") if name.strip()] if only else []
    result = comparing.compare_runs(*places, (step_a, step_b), chosen, rounds, seed)
    print_result(as_json, result, "" if as_json else comparing.as_text(result))


VERBS = (inspect, report, generate, export, checkpoints, compress, compare)
