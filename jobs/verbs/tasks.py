"""`telar tasks` and `telar tasks validate`: a group of the command line; bodies import what they need."""

from __future__ import annotations

import click

from jobs.verbs.options import as_json, print_result


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def tasks(context: click.Context, as_json: bool) -> None:
    """List the tasks of corpora and the built-in tasks; `telar tasks validate FILE` checks one of your own."""
    if context.invoked_subcommand is not None:
        return
    from jobs.commands.task_listing import listing, listing_text

    found = listing()
    print_result(as_json, found, listing_text(found))


@tasks.command()
@click.argument("task", metavar="FILE|NAME")
@click.option("--datasets", metavar="URL", help="Folder of the files of built-in tasks (evaluate.datasets).")
@as_json
def validate(task: str, datasets: str | None, as_json: bool) -> None:
    """Check a task's fields, read its rows and show the first request; exit code 2 for fields, 1 for rows."""
    from jobs.commands.task_listing import validate, validated_text

    found = validate(task, datasets)
    print_result(as_json, found, validated_text(found))
