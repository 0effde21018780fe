"""What every benchmark of training leaves: one JSON with all measurements, and its table, printed and beside it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.machine import hardware, versions
from tests.bench.figures import Spread


def finish(options: argparse.Namespace, content: dict[str, Any], table: Sequence[str]) -> None:
    """Print the table; write `options.out` (JSON) and the table beside it as .md."""
    whole = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        **content,
        # The load of the last minute tells whether others used the machine.
        "load": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(whole, indent=1))
    text = "\n".join(table) + "\n"
    options.out.with_suffix(".md").write_text(text)
    print(text, flush=True)


def show(found: Spread, digits: int = 2, unit: str = "") -> str:
    """The median and, of several, the range."""
    middle = f"{found.middle:,.{digits}f}{unit}"
    return middle if found.count == 1 else f"{middle} ({found.low:,.{digits}f} to {found.high:,.{digits}f})"


def rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]
