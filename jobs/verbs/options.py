"""Options that several verbs have, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

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


def print_result(as_json: bool, result: dict[str, Any], text: str) -> None:
    """The result as one JSON object, or the text."""
    click.echo(json.dumps(result, indent=1, default=str) if as_json else text)


def writer(to_stderr: bool) -> Callable[[str], None]:
    """Writes text as it comes, to standard error where standard output is for the result."""
    stream = sys.stderr if to_stderr else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write
